"""Bytes to `XRay`: the one way in, for image files and DICOM alike.

Whatever is not one picture raises an `XRayError` with one sentence that says
what to do. Only the pixels and a few fixed remarks are kept of a file: no
patient data, neither in errors nor in warnings or logs.
"""

import logging
import os
import stat
import threading
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .dicom import decode_dicom, looks_like_dicom
from .raster import MAX_BYTES, SAVE_AS, XRayError, decode_raster
from .stored import Spacing, Stored

_LOCK = threading.Lock()
_LOGGERS = [logging.getLogger(name) for name in ("pydicom", "PIL.Image", "PIL.PngImagePlugin", "PIL.TiffImagePlugin")]


@dataclass(frozen=True)
class XRay:
    """One X-ray, as read.

    Attributes:
        pixels: (H, W) float32 from 0 to 1, stretched to the full range, lungs dark as on film.
        remarks: sentences about the file that a reader of the result should know.
        stored: what the file holds before any window, for whoever chooses one; None of a picture made otherwise.
        spacing: the distance of pixels in millimetres; None where the file does not say.
    """

    pixels: np.ndarray
    remarks: tuple[str, ...] = ()
    stored: Stored | None = None
    spacing: Spacing | None = None


def load_xray(source: str | os.PathLike | bytes | BinaryIO) -> XRay:
    """Read an X-ray from a path, from bytes or from a file opened in binary mode.

    PNG and TIFF (8 and 16 bit; grey, colour, palette, with alpha over black),
    JPEG, BMP, WebP (EXIF rotation applied) and single-frame DICOM (modality
    LUT or rescale, VOI LUT or window, then MONOCHROME1 inverted; compressed
    syntaxes too). The darkest pixel becomes 0 and the brightest 1,
    whatever the bit depth; a constant picture becomes all 0.

    Raises:
        XRayError: anything that is not one readable picture of at least 64×64
            and at most 50 million pixels.
    """
    try:
        data = _read(source)
        with quiet():
            values, remarks, *more = decode_dicom(data) if looks_like_dicom(data) else decode_raster(data)
            return XRay(_to_unit_range(values), tuple(remarks), *more)
    except XRayError as error:
        sentence = str(error)
    except MemoryError:
        sentence = "There is not enough memory to read this picture; save it smaller and try again."
    except Exception:  # decoders raise every kind of error on damaged bytes
        sentence = f"The file is damaged or of an unknown kind; export it again, or {SAVE_AS}"
    raise XRayError(sentence)  # out here, as a chained decoder error could quote the header


@contextmanager
def quiet():
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
