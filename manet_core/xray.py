"""Bytes to `XRay`: the one place where image files and DICOM are decoded.

Everything that cannot be one picture ends in an `XRayError` whose one sentence
says what to do. Nothing of the file but its pixels and a few fixed remarks is
kept: no name, no date, no patient, neither in errors nor in warnings or logs.
"""

import io
import logging
import os
import stat
import subprocess
import sys
import threading
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

MIN_SIDE = 64
MAX_PIXELS = 50_000_000
MAX_BYTES = 200_000_000

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_SAVE_AS = "save it as PNG, JPEG, TIFF, BMP, WebP or DICOM and try again."
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
_COLOUR_TOLERANCE = 0.08  # mean difference between colour channels, of full scale

# All that is read of a DICOM header; what it says of the patient is skipped, not read and forgotten.
_PIXEL_TAGS = """
    Rows Columns SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames BitsAllocated BitsStored
    HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept
    ModalityLUTSequence VOILUTSequence VOILUTFunction WindowCenter WindowWidth PixelData FloatPixelData
    DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths""".split()
_PALETTE_TAGS = [
    f"{prefix}{colour}PaletteColorLookupTable{suffix}"
    for colour in ("Red", "Green", "Blue")
    for prefix, suffix in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
_REMARK_TAGS = ["Modality", "ViewPosition", "BodyPartExamined"]

# Pillow reads little-endian 16-bit WhiteIsZero (and leaves the inversion to `_decode_image`), but not big-endian.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))

_LOCK = threading.Lock()
_LOGGERS = [logging.getLogger(name) for name in ("pydicom", "PIL.Image", "PIL.PngImagePlugin", "PIL.TiffImagePlugin")]


class XRayError(ValueError):
    """A file that cannot be read as an X-ray; its text is one sentence that says what to do."""


@dataclass(frozen=True)
class XRay:
    """One X-ray, as read.

    Attributes:
        pixels: (H, W) float32 from 0 to 1, stretched to the full range, lungs dark as on film.
        remarks: plain sentences about the file that a reader of the result should know.
    """

    pixels: np.ndarray
    remarks: tuple[str, ...] = ()


def load_xray(source: str | os.PathLike | bytes | BinaryIO) -> XRay:
    """Read an X-ray from a path, from bytes or from a file opened in binary mode.

    PNG and TIFF (8 and 16 bit; grey, colour, palette, with alpha over black),
    JPEG, BMP, WebP (EXIF rotation applied) and single-frame DICOM (modality
    LUT or rescale, VOI LUT or window, then MONOCHROME1 inverted; compressed
    syntaxes too). Bit depth leaves no trace: the darkest pixel becomes 0 and
    the brightest 1; a picture of one even shade becomes all 0.

    Raises:
        XRayError: anything that is not one readable picture of at least 64×64
            and at most 50 million pixels.
    """
    try:
        data = _read(source)
        with _quiet():
            values, remarks = _decode_dicom(data) if _looks_like_dicom(data) else _decode_image(data)
            return XRay(_to_unit_range(values), tuple(remarks))
    except XRayError as error:
        sentence = str(error)
    except MemoryError:
        sentence = "There is not enough memory to read this picture; save it smaller and try again."
    except Exception:  # decoders raise every kind of error on damaged bytes
        sentence = f"The file is damaged or of an unknown kind; export it again, or {_SAVE_AS}"
    raise XRayError(sentence)  # out here, as a chained decoder error could quote the header


@contextmanager
def _quiet():
    """Silence the decoders' warnings and log records, which may quote the header, in this thread and this block.

    Warning filters belong to the whole process, so two threads that save and
    restore them must not overlap: pictures are decoded one at a time, which
    also bounds the memory.
    """
    thread = threading.get_ident()

    def is_from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in _LOGGERS:
            logger.addFilter(is_from_elsewhere)
        try:
            yield
        finally:
            for logger in _LOGGERS:
                logger.removeFilter(is_from_elsewhere)


def _read(source) -> bytes:
    """The whole file, refused early where it is no file, empty or too large."""
    too_large = f"The file is larger than {MAX_BYTES // 10**6} MB; save it smaller and try again."
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif hasattr(source, "read"):
        try:
            data = source.read(MAX_BYTES + 1)
        except Exception as error:
            raise XRayError("The file cannot be read; open it again with mode 'rb'.") from error
        if not isinstance(data, bytes):
            raise XRayError("The file is open in text mode; open it with mode 'rb'.")
    else:
        try:
            path = Path(source)
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise XRayError("This is a folder or a device, not a file; choose one image file.")
            if status.st_size > MAX_BYTES:
                raise XRayError(too_large)
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise XRayError("There is no such file; check its name and folder.") from error
        except PermissionError as error:
            raise XRayError("The file may not be read; check its permissions.") from error
        except (OSError, RuntimeError, TypeError) as error:
            raise XRayError("The file cannot be opened; give the path of one image file.") from error
        except ValueError as error:
            if isinstance(error, XRayError):
                raise
            raise XRayError("The file's name holds a character that no file name may hold; check it.") from error
    if not data:
        raise XRayError("The file is empty; export or download it again.")
    if len(data) > MAX_BYTES:
        raise XRayError(too_large)
    return data


def _check_size(height: int, width: int) -> None:
    """Refuse too many or too few pixels; called with the header's numbers, before decoding."""
    if height * width > MAX_PIXELS:
        raise XRayError(
            f"The picture has {height * width / 1e6:.0f} million pixels and at most "
            f"{MAX_PIXELS // 10**6} million are read; scale it down and try again."
        )
    if min(height, width) < MIN_SIDE:
        raise XRayError(
            f"The picture is only {width}×{height} pixels; use the original X-ray, at least {MIN_SIDE}×{MIN_SIDE}."
        )


def _to_unit_range(values: np.ndarray) -> np.ndarray:
    """`values` (H, W), stretched in place from their smallest and largest to 0 and 1."""
    low, high = values.min(), values.max()
    with np.errstate(all="ignore"):
        span = high - low
    if not np.isfinite(span):
        raise XRayError("The picture holds values that are not numbers (NaN or infinite); export it again.")
    values -= low
    if span > 0:
        values /= span
    return values.clip(0, 1, out=values)


# Pictures


def _open_image(data: bytes) -> Image.Image:
    """The picture, its header read and checked, its pixels not yet decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise XRayError(f"This is not a picture that MANet can read; {_SAVE_AS}") from error
    except Image.DecompressionBombError as error:
        raise XRayError("The picture is far too large; scale it down and try again.") from error
    _check_size(image.height, image.width)
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # MPO: a camera's JPEG with previews
        raise XRayError("The file holds several pictures; save the one X-ray as a file of its own.")
    return image


def _decode_image(data: bytes) -> tuple[np.ndarray, list[str]]:
    image = _open_image(data)
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
    rawmode = _rawmode(image.tile[0].args) if image.tile else ""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image, np.float32)
        return (-values if white_is_zero else values), []  # Pillow inverts at 1 and 8 bits, not beyond
    if image.mode in ("1", "L"):
        return np.array(image.convert("L"), np.float32), []
    if image.mode not in ("RGB", "RGBA"):
        has_alpha = image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    samples = np.asarray(image)
    if rawmode in _LOW_BYTES:
        samples = _join_bytes(samples, data, rawmode)
    return _grey(samples)


# Pillow keeps the high bytes of 16-bit colour only; decoded once more in this order, a file yields the low bytes.
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_LOW_BYTES = {f"{mode};16{old}": f"{mode};16{new}" for mode in ("RGB", "RGBA") for old, new in _SWAPPED.items()}
_LOW_BYTES["LA;16B"] = "RGBA"  # its four bytes as they are: grey high, grey low, alpha high, alpha low


def _rawmode(args: str | tuple) -> str:
    return args if isinstance(args, str) else args[0]


def _join_bytes(high: np.ndarray, data: bytes, rawmode: str) -> np.ndarray:
    """uint16 of `high` and the low bytes, which a second decoding of `data` brings."""
    image = _open_image(data)
    low_mode = _LOW_BYTES[rawmode]
    tiles = [(tile, () if isinstance(tile.args, str) else tile.args[1:]) for tile in image.tile]
    image.tile = [tile._replace(args=(low_mode, *rest)) for tile, rest in tiles]
    low = np.asarray(ImageOps.exif_transpose(image))
    if low_mode == "RGBA":
        high, low = low[..., [0, 0, 0, 2]], low[..., [1, 1, 1, 3]]
    return high.astype(np.uint16) << 8 | low


def _grey(samples: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Luminance of (H, W, 3 or 4), alpha over black, and a remark where the channels differ."""
    values = np.empty(samples.shape[:2], np.float32)
    for row, out in zip(samples, values):  # row by row, as all of it in float32 may be 800 MB
        np.matmul(row[:, :3], _LUMINANCE, out=out)
        if samples.shape[2] == 4:
            out *= row[:, 3] / np.float32(np.iinfo(samples.dtype).max)
    step = [max(1, side // 256) for side in values.shape]
    thumbnail = samples[:: step[0], :: step[1]].astype(np.float32)
    if samples.shape[2] == 4:
        thumbnail *= thumbnail[..., 3:] > 0
    thumbnail = thumbnail[..., :3]
    colour = float((thumbnail.max(2) - thumbnail.min(2)).mean()) / max(1.0, float(thumbnail.max()))
    if colour > _COLOUR_TOLERANCE:
        return values, ["The picture is in colour, and X-rays are grey; check that this is a chest X-ray."]
    return values, []


# DICOM


def _looks_like_dicom(data: bytes) -> bool:
    """The DICM marker, or (without preamble) a first element of group 0002 or 0008, in either byte order."""
    group, element = data[:2], data[2:4]
    little = group in (b"\x02\x00", b"\x08\x00") and element[1:] == b"\x00"
    big = group == b"\x00\x08" and element[:1] == b"\x00"
    return data[128:132] == b"DICM" or little or big


def _decode_dicom(data: bytes) -> tuple[np.ndarray, list[str]]:
    from pydicom.pixels import apply_color_lut

    dataset = _read_dataset(data)
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        if "Rows" in dataset:
            raise XRayError("The DICOM file ends before its pixels; export or download it again.")
        raise XRayError("The DICOM file has no picture in it; export the image itself, not a report or a directory.")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise XRayError("The DICOM file holds several frames; export the one frontal X-ray as a file of its own.")
    _check_size(int(dataset.Rows), int(dataset.Columns))
    try:
        stored = _decode_pixels(dataset, data)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)
    except Exception as error:
        raise XRayError(
            "The DICOM file's pixels are damaged or in an unknown compression; export it again, uncompressed."
        ) from error
    remarks = _header_remarks(dataset)
    if stored.ndim == 3:
        values, colour = _grey(stored)
        return values, remarks + colour

    padded = _padding(stored, dataset)
    values = _apply_modality(stored.astype(np.float32), dataset)
    shown = _apply_voi(values, dataset)
    if shown.min() == shown.max() and values.min() != values.max() or not np.isfinite(shown).all():
        shown = values
        remarks.append("The window in the DICOM header leaves nothing to see; the full range of greys is shown.")
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        np.negative(shown, out=shown)
    if padded is not None:
        shown[padded] = shown.min(where=~padded, initial=np.inf)
    return shown, remarks


def _read_dataset(data: bytes):
    """The header elements named above and the pixels, still encoded."""
    from pydicom import dcmread, uid
    from pydicom.filereader import read_dataset, read_preamble

    if uid.DeflatedExplicitVRLittleEndian.encode() in data[:2048]:
        file = io.BytesIO(data)  # inflated here once with a limit, as pydicom knows none
        read_preamble(file, force=True)
        read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        inflate.decompress(data[file.tell() :], MAX_BYTES)
        if inflate.unconsumed_tail:
            raise XRayError("The DICOM file is far too large once unpacked; export it again, uncompressed.")
    tags = [*_PIXEL_TAGS, *_PALETTE_TAGS, *_REMARK_TAGS]
    dataset = dcmread(io.BytesIO(data), force=True, specific_tags=tags)
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return dataset


_DECODE_APART = """
import io, sys, numpy, pydicom
numpy.save(sys.stdout.buffer, pydicom.pixels.pixel_array(io.BytesIO(sys.stdin.buffer.read())))
"""


def _decode_pixels(dataset, data: bytes) -> np.ndarray:
    """The stored values, (H, W) or (H, W, 3); `data` is the file.

    GDCM aborts the whole process on damaged JPEG and JPEG-LS, so it runs in a
    process of its own, and only where pydicom has no other decoder.
    """
    from pydicom import uid
    from pydicom.pixels import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax in (uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless):
        command = [sys.executable, "-P", "-c", _DECODE_APART]
        child = subprocess.run(command, input=data, capture_output=True, check=True, timeout=60)
        return np.load(io.BytesIO(child.stdout))
    by_pillow = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEG2000Lossless, uid.JPEG2000)
    return pixel_array(dataset, decoding_plugin="pillow" if syntax in by_pillow else "")


def _padding(stored: np.ndarray, dataset) -> np.ndarray | None:
    """Where the picture is padding outside the film; None where nowhere or everywhere."""
    first = dataset.get("PixelPaddingValue")
    if first is None or stored.dtype.kind not in "iu":
        return None
    last = dataset.get("PixelPaddingRangeLimit")
    bounds = np.array([first, first if last is None else last], np.int64).astype(stored.dtype)  # US or SS, wrapped
    padded = (stored >= bounds.min()) & (stored <= bounds.max())
    return padded if padded.any() and not padded.all() else None


# pydicom's own `apply_modality_lut` and `apply_voi_lut` need several float64 copies, invert the picture where a window
# meets a negative rescale slope, and wrap indices around in 8-bit VOI LUTs. The scale of the result is free here, as
# it is stretched in the end.


def _apply_modality(values: np.ndarray, dataset) -> np.ndarray:
    """`values` (float32) through the modality LUT or rescale, in place."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(values, dataset.ModalityLUTSequence[0], dataset)
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    if slope is not None:
        values *= np.float32(slope)
    if intercept is not None:
        values += np.float32(intercept)
    return values


def _apply_voi(values: np.ndarray, dataset) -> np.ndarray:
    """`values` through the first VOI LUT, or else the first window, of PS3.3 C.11.2; `values` where there is none."""
    if dataset.get("VOILUTSequence"):
        return _look_up(values.copy(), dataset.VOILUTSequence[0], dataset)
    window = [dataset.get(tag) for tag in ("WindowCenter", "WindowWidth")]
    if None in window:
        return values
    center, width = (float(np.ravel(numbers)[0]) for numbers in window)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    width = max(width, 1e-3)
    shown = (values - np.float32(center)) / np.float32(width)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * shown))
    return shown.clip(-0.5, 0.5, out=shown)


def _look_up(values: np.ndarray, item, dataset) -> np.ndarray:
    """`values`, each replaced in place by its entry in the LUT of `item`."""
    count, first, _ = (int(number) for number in item.LUTDescriptor)
    table = item.LUTData
    if isinstance(table, bytes):
        wide = len(table) >= 2 * (count or 2**16)
        order = "<" if dataset.original_encoding[1] else ">"
        table = np.frombuffer(table, f"{order}u2" if wide else "u1")
    table = np.asarray(table, np.float32)[: count or 2**16]
    if first >= 2**15 and values.max() < first:
        first -= 2**16  # a signed number under an unsigned label
    for row in values:
        row[:] = table[np.clip(row - first, 0, len(table) - 1).astype(np.intp)]
    return values


def _header_remarks(dataset) -> list[str]:
    """What the header says against a frontal chest radiograph, in fixed sentences."""
    remarks = []
    modality, view, body_part = (str(dataset.get(tag) or "").strip().upper() for tag in _REMARK_TAGS)
    if modality and modality not in ("CR", "DX", "DR", "RG", "XR", "OT", "SC", "RF"):
        name = modality if modality in ("CT", "MR", "US", "MG", "NM", "PT", "XA") else "another modality"
        remarks.append(f"The DICOM header says {name}, not radiography; MANet knows chest X-rays only.")
    if view in ("LL", "RL", "LATERAL", "LAT", "LLD", "RLD"):
        remarks.append("The DICOM header says lateral view; MANet knows frontal views only.")
    if body_part and not any(word in body_part for word in ("CHEST", "THORAX", "TORAX", "LUNG", "RIB", "PORT")):
        remarks.append("The DICOM header names another body part than the chest; MANet knows chest X-rays only.")
    return remarks
