"""Bytes to `XRay`: the one place where image files and DICOM are decoded.

Everything that cannot be one frontal X-ray in shades of grey ends in an
`XRayError` whose one sentence says what to do. Nothing of the file but its
pixels and a few technical remarks is kept: no name, no date, no patient.
"""

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MIN_SIDE = 64
MAX_PIXELS = 50_000_000
MAX_BYTES = 200_000_000

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_SAVE_AS = "save it as PNG, JPEG, TIFF, BMP, WebP or DICOM and try again."
_COLOUR_TOLERANCE = 0.08  # mean difference between colour channels, of full scale


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

    PNG, TIFF (8 and 16 bit; grey, colour, palette, with alpha), JPEG, BMP, WebP
    (EXIF rotation applied) and single-frame DICOM (modality LUT, VOI LUT or
    window, then MONOCHROME1 inverted; compressed syntaxes too). Bit depth and
    window leave no trace: the darkest pixel becomes 0 and the brightest 1.

    Raises:
        XRayError: anything that is not one readable picture of at least 64×64
            and at most 50 million pixels.
    """
    data = _read(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders remark on metadata that is not used here
            values, remarks = _decode_dicom(data) if _looks_like_dicom(data) else _decode_image(data)
    except XRayError:
        raise
    except MemoryError as error:
        raise XRayError("There is not enough memory to read this picture; save it smaller and try again.") from error
    except Exception as error:  # decoders raise every kind of error on damaged bytes
        raise XRayError(f"The file is damaged or of an unknown kind; export it again, or {_SAVE_AS}") from error
    return XRay(_to_unit_range(values), tuple(remarks))


def _read(source) -> bytes:
    """The whole file, refused early where it is no file, empty or too large."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif hasattr(source, "read"):
        data = source.read(MAX_BYTES + 1)
        if not isinstance(data, bytes):
            raise XRayError("The file is open in text mode; open it with mode 'rb'.")
    else:
        try:
            path = Path(source)
            if not stat.S_ISREG(path.stat().st_mode):
                raise XRayError("This is a folder or a device, not a file; choose one image file.")
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError as error:
            raise XRayError("There is no such file; check its name and folder.") from error
        except PermissionError as error:
            raise XRayError("The file may not be read; check its permissions.") from error
        except (OSError, ValueError, TypeError) as error:
            raise XRayError("The file cannot be opened; give the path of one image file.") from error
    if not data:
        raise XRayError("The file is empty; export or download it again.")
    if len(data) > MAX_BYTES:
        raise XRayError(f"The file is larger than {MAX_BYTES // 10**6} MB; save it smaller and try again.")
    return data


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise XRayError(
            f"The picture has {height * width / 1e6:.0f} million pixels and at most "
            f"{MAX_PIXELS // 10**6} million are read; scale it down and try again."
        )
    if min(height, width) < MIN_SIDE:
        raise XRayError(
            f"The picture is only {width}×{height} pixels; use the original X-ray, at least {MIN_SIDE}×{MIN_SIDE}."
        )


def _decode_image(data: bytes) -> tuple[np.ndarray, list[str]]:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise XRayError(f"This is not a picture that MANet can read; {_SAVE_AS}") from error
    except Image.DecompressionBombError as error:
        raise XRayError("The picture is far too large; scale it down and try again.") from error
    with image:
        _check_size(image.height, image.width)
        if getattr(image, "n_frames", 1) > 1:
            raise XRayError("The file holds several pictures; save the one X-ray as a file of its own.")
        white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0 and image.mode.startswith("I;16")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, np.float32)
            return (-values if white_is_zero else values), []
        if image.mode in ("1", "L"):
            return np.asarray(image.convert("L"), np.float32), []
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return _grey(np.asarray(image.convert("RGB")))


def _grey(rgb: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Luminance (ITU-R 601) of (H, W, 3), and a remark where the channels differ."""
    thumbnail = rgb[:: max(1, rgb.shape[0] // 256), :: max(1, rgb.shape[1] // 256)].astype(np.float32)
    full_scale = max(1.0, float(thumbnail.max()))
    colour = float((thumbnail.max(2) - thumbnail.min(2)).mean()) / full_scale
    remarks = []
    if colour > _COLOUR_TOLERANCE:
        remarks.append("The picture is in colour, and X-rays are grey; check that this is a chest X-ray.")
    return rgb @ np.array([0.299, 0.587, 0.114], np.float32), remarks


def _looks_like_dicom(data: bytes) -> bool:
    """The DICM marker, or (without preamble) a first element of group 0002 or 0008."""
    return data[128:132] == b"DICM" or data[:4] in (b"\x02\x00\x00\x00", b"\x08\x00\x00\x00", b"\x08\x00\x05\x00", b"\x08\x00\x08\x00", b"\x08\x00\x16\x00")


def _decode_dicom(data: bytes) -> tuple[np.ndarray, list[str]]:
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise XRayError("The DICOM file has no picture in it; export the image itself, not a report or a directory.")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise XRayError("The DICOM file holds several frames; export the one frontal X-ray as a file of its own.")
    _check_size(int(dataset.Rows), int(dataset.Columns))
    try:
        stored = dataset.pixel_array
    except Exception as error:
        raise XRayError(
            "The DICOM file's pixels are damaged or in an unknown compression; export it again, uncompressed."
        ) from error
    remarks = _dicom_remarks(dataset)
    if stored.ndim == 3:
        values, colour = _grey(stored)
        return values, remarks + colour

    values = apply_voi_lut(apply_modality_lut(stored, dataset), dataset).astype(np.float32)
    padding = dataset.get("PixelPaddingValue")
    if padding is not None and not isinstance(padding, bytes):
        last = dataset.get("PixelPaddingRangeLimit", padding)
        padded = (stored >= min(padding, last)) & (stored <= max(padding, last))
    else:
        padded = np.zeros(stored.shape, bool)
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        values = -values
    if padded.any() and not padded.all():
        values[padded] = values[~padded].min()
    return values, remarks


def _dicom_remarks(dataset) -> list[str]:
    """What the header says against a frontal chest radiograph; fixed sentences, no header text but code words."""
    remarks = []
    modality = str(dataset.get("Modality", "")).strip().upper()
    if modality and modality not in ("CR", "DX", "DR", "RG", "XR", "OT", "SC", "PX", "RF"):
        name = modality if modality in ("CT", "MR", "US", "MG", "NM", "PT", "XA") else "another modality"
        remarks.append(f"The DICOM header says {name}, not radiography; MANet knows chest X-rays only.")
    view = str(dataset.get("ViewPosition", "")).strip().upper()
    if view in ("LL", "RL", "LATERAL", "LAT", "LLD", "RLD"):
        remarks.append("The DICOM header says lateral view; MANet knows frontal views only.")
    body_part = str(dataset.get("BodyPartExamined", "")).strip().upper()
    if body_part and not any(word in body_part for word in ("CHEST", "THORAX", "LUNG", "RIB", "PORT")):
        remarks.append("The DICOM header names another body part than the chest; MANet knows chest X-rays only.")
    return remarks


def _to_unit_range(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, np.float32)
    _check_size(*values.shape)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise XRayError("The picture holds values that are not numbers (NaN or infinite); export it again.")
    values -= np.float32(low)
    if high > low:
        values /= np.float32(high - low)
    return values.clip(0, 1, out=values)
