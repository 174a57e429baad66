"""DICOM to an array: modality LUT, VOI LUT or window, then MONOCHROME1 inverted."""

import io
import subprocess
import sys
import zlib

import numpy as np

from .raster import MAX_BYTES, XRayError, check_size, grey
from .stored import Spacing, Stored

# All that is read of a DICOM header; patient data are never read.
_PIXEL_TAGS = """
    Rows Columns SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames BitsAllocated BitsStored
    HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept
    ModalityLUTSequence VOILUTSequence VOILUTFunction WindowCenter WindowWidth PresentationLUTShape PixelData
    FloatPixelData DoubleFloatPixelData ExtendedOffsetTable ExtendedOffsetTableLengths PixelSpacing
    ImagerPixelSpacing""".split()
_PALETTE_TAGS = [
    f"{prefix}{colour}PaletteColorLookupTable{suffix}"
    for colour in ("Red", "Green", "Blue")
    for prefix, suffix in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
]
_REMARK_TAGS = ["Modality", "ViewPosition", "BodyPartExamined"]
HEADER_DENIES = "The DICOM header says"  # begins the remarks on another modality or view, and no others


def looks_like_dicom(data: bytes) -> bool:
    """The DICM marker, or (without preamble) a first element of group 0002 or 0008, in either byte order."""
    group, element = data[:2], data[2:4]
    little = group in (b"\x02\x00", b"\x08\x00") and element[1:] == b"\x00"
    big = group == b"\x00\x08" and element[:1] == b"\x00"
    return data[128:132] == b"DICM" or little or big


def decode_dicom(data: bytes) -> tuple[np.ndarray, list[str], Stored | None, Spacing | None]:
    """Values (H, W) float32 of a DICOM file, lungs dark; remarks where its header says another kind of picture; its
    values on their full range; the distance of its pixels.

    Raises:
        XRayError: no picture, several, damaged pixels, or a size out of bounds.
    """
    from pydicom.pixels import apply_color_lut

    dataset = _read_dataset(data)
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        if "Rows" in dataset:
            raise XRayError("The DICOM file ends before its pixels; export or download it again.")
        raise XRayError("The DICOM file has no picture in it; export the image itself, not a report or a directory.")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise XRayError("The DICOM file holds several frames; export the one frontal X-ray as a file of its own.")
    check_size(int(dataset.Rows), int(dataset.Columns))
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
        values, colour = grey(stored)
        return values, remarks + colour, Stored.of(values), _spacing(dataset)

    padded = _padding(stored, dataset)
    values = _apply_modality(stored.astype(np.float32), dataset)
    shown, window = _apply_voi(values, dataset)
    if shown.min() == shown.max() and values.min() != values.max() or not np.isfinite(shown).all():
        shown, window = values, None
        remarks.append("The window in the DICOM header does not fit the pixels; the full range of greys is shown.")
    inverted = is_inverted(dataset)
    full = Stored.of(shown if window is None else values, window, inverted, padded)
    if inverted:
        np.negative(shown, out=shown)
    if padded is not None:
        shown[padded] = shown.min(where=~padded, initial=np.inf)
    return shown, remarks, full, _spacing(dataset)


def is_inverted(dataset) -> bool:
    """Whether a header says that low values are bright.

    INVERSE repeats what MONOCHROME1 says (PS3.3 C.8.11.3.1.2) and does not undo it.
    """
    return dataset.get("PhotometricInterpretation") == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE"


def read_elements(data: bytes, names: list[str]):
    """The elements `names` of a DICOM file as a pydicom dataset; pixels stay encoded.

    A deflated file is inflated here, with a limit, as pydicom knows none.

    Raises:
        XRayError: it is too large once inflated, or cut short.
    """
    from pydicom import dcmread, uid
    from pydicom.filereader import _read_file_meta_info, read_dataset, read_preamble
    from pydicom.tag import Tag

    file = io.BytesIO(data)
    read_preamble(file, force=True)
    meta = _read_file_meta_info(file)  # by which `dcmread` decides, too: it is given nothing that it would inflate
    if meta.get("TransferSyntaxUID") != uid.DeflatedExplicitVRLittleEndian:
        return dcmread(io.BytesIO(data), force=True, specific_tags=names)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflate.decompress(file.read(), MAX_BYTES)
    if inflate.unconsumed_tail:
        raise XRayError("The DICOM file is far too large once unpacked; export it again, uncompressed.")
    if not inflate.eof:
        raise XRayError("The DICOM file is cut short; export or download it again.")
    dataset = read_dataset(io.BytesIO(inflated), False, True, specific_tags=[Tag(name) for name in names])
    dataset.file_meta = meta
    return dataset


def _read_dataset(data: bytes):
    """The header elements named above and the pixels, still encoded."""
    from pydicom import uid

    dataset = read_elements(data, [*_PIXEL_TAGS, *_PALETTE_TAGS, *_REMARK_TAGS])
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return dataset


# GDCM decodes 12-bit JPEG Extended, but pydicom refuses to ask it by that name; both JPEGs are one codec there.
_DECODE_APART = """
import io, sys, numpy, pydicom
dataset = pydicom.dcmread(io.BytesIO(sys.stdin.buffer.read()), force=True)
if dataset.file_meta.TransferSyntaxUID == pydicom.uid.JPEGExtended12Bit:
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
numpy.save(sys.stdout.buffer, pydicom.pixels.pixel_array(dataset, decoding_plugin="gdcm"))
"""


def _decode_pixels(dataset, data: bytes) -> np.ndarray:
    """The stored values, (H, W) or (H, W, 3); `data` is the file.

    GDCM aborts the whole process on damaged JPEG and JPEG-LS, so it runs in a
    process of its own, and only where pydicom has no other decoder.
    """
    from pydicom import uid
    from pydicom.pixels import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    only_gdcm = (uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless)
    if syntax in only_gdcm or syntax == uid.JPEGExtended12Bit and dataset.BitsStored > 8:
        command = [sys.executable, "-P", "-c", _DECODE_APART]
        seconds = 8 + dataset.Rows * dataset.Columns / 1e6
        child = subprocess.run(command, input=data, capture_output=True, check=True, timeout=seconds)
        return np.load(io.BytesIO(child.stdout))
    by_pillow = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEG2000Lossless, uid.JPEG2000)
    if syntax in by_pillow:
        return pixel_array(dataset, decoding_plugin="pillow")
    # Pydicom takes the lowest bits for the stored ones whatever HighBit says; other compressions have no bits to spare.
    below = int(dataset.get("HighBit") or 0) + 1 - dataset.BitsStored
    if below <= 0 or below + dataset.BitsStored > dataset.BitsAllocated:
        return pixel_array(dataset)
    dataset.BitsStored += below
    return pixel_array(dataset) >> below


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


def _apply_voi(values: np.ndarray, dataset) -> tuple[np.ndarray, tuple[float, float] | None]:
    """`values` through the first VOI LUT, or else the first window, of PS3.3 C.11.2; `values` where there is none.

    With it come the values that such a window shows darkest and brightest; None of anything but a straight window.
    """
    if dataset.get("VOILUTSequence"):
        return _look_up(values.copy(), dataset.VOILUTSequence[0], dataset), None
    window = [dataset.get(tag) for tag in ("WindowCenter", "WindowWidth")]
    if None in window:
        return values, None
    center, width = (float(np.ravel(numbers)[0]) for numbers in window)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    width = max(width, 1e-3)
    shown = (values - np.float32(center)) / np.float32(width)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * shown)), None
    return shown.clip(-0.5, 0.5, out=shown), (center - width / 2, center + width / 2)


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


def _spacing(dataset) -> Spacing | None:
    """The distance of pixels, PixelSpacing or else ImagerPixelSpacing; None where the header has no usable one.

    A PixelSpacing that repeats the ImagerPixelSpacing is the detector's, too: nothing was corrected for
    magnification (PS3.3 10.7.1.1).
    """
    at_detector = _millimetres(dataset.get("ImagerPixelSpacing"))
    given = _millimetres(dataset.get("PixelSpacing")) or at_detector
    if given is None:
        return None
    same = at_detector is not None and np.allclose(given, at_detector, rtol=1e-3, atol=0)  # whatever the digits written
    return Spacing(*given, same)


def _millimetres(pair) -> tuple[float, float] | None:
    """The values of a header's element of spacing, of rows and of columns; None where they are not usable."""
    try:
        rows, columns = (float(number) for number in pair)
    except (TypeError, ValueError):
        return None
    return (rows, columns) if 0 < rows < 100 and 0 < columns < 100 else None


def _header_remarks(dataset) -> list[str]:
    """Fixed sentences where the header contradicts a frontal chest radiograph."""
    remarks = []
    modality, view, body_part = (str(dataset.get(tag) or "").strip().upper() for tag in _REMARK_TAGS)
    if modality and modality not in ("CR", "DX", "DR", "RG", "XR", "OT", "SC", "RF"):
        name = modality if modality in ("CT", "MR", "US", "MG", "NM", "PT", "XA") else "another modality"
        remarks.append(f"{HEADER_DENIES} {name}, not radiography; MANet was trained on chest X-rays only.")
    if view in ("LL", "RL", "LATERAL", "LAT", "LLD", "RLD"):
        remarks.append(f"{HEADER_DENIES} lateral view; MANet was trained on frontal views only.")
    if body_part and not any(word in body_part for word in ("CHEST", "THORAX", "TORAX", "LUNG", "RIB", "PORT")):
        remarks.append("The DICOM header names another body part; MANet was trained on chest X-rays only.")
    return remarks
