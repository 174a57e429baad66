"""PNG, JPEG, TIFF, BMP and WebP to an array, and what every decoder shares: size limits, grey levels, errors."""

import io
import sys

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from .stored import Stored

MIN_SIDE = 64
MAX_PIXELS = 50_000_000
MAX_BYTES = 200_000_000

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
SAVE_AS = "save it as PNG, JPEG, TIFF, BMP, WebP or DICOM and try again."
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601
_COLOUR_TOLERANCE = 0.08  # mean difference between colour channels, of full scale

# Pillow reads little-endian 16-bit WhiteIsZero (and leaves the inversion to `decode_raster`), but not big-endian.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


class XRayError(ValueError):
    """A file that cannot be read as an X-ray; its text is one sentence that says what to do."""


def check_size(height: int, width: int) -> None:
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


def _open_image(data: bytes) -> Image.Image:
    """The picture, its header read and checked, its pixels not yet decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise XRayError(f"This is not a picture that MANet can read; {SAVE_AS}") from error
    except Image.DecompressionBombError as error:
        raise XRayError("The picture is far too large; scale it down and try again.") from error
    check_size(image.height, image.width)
    # MPO is a camera's JPEG with previews. To count the pages of a TIFF takes minutes if there are a million.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise XRayError("The file holds several pictures; save the one X-ray as a file of its own.")
    return image


def decode_raster(data: bytes) -> tuple[np.ndarray, list[str], Stored | None]:
    """Values (H, W) float32 of an image file, remarks, and the values on their full range.

    Raises:
        XRayError: it is no picture of a known kind, or its size is out of bounds.
    """
    image = _open_image(data)
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0
    rawmode = _rawmode(image.tile[0].args) if image.tile else ""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.array(image, np.float32)
        stored = Stored.of(values, inverted=white_is_zero)
        return (-values if white_is_zero else values), [], stored  # Pillow inverts at 1 and 8 bits, not beyond
    if image.mode in ("1", "L"):
        values = np.array(image.convert("L"), np.float32)
        return values, [], Stored.of(values)
    if image.mode not in ("RGB", "RGBA"):
        has_alpha = image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    samples = np.asarray(image)
    if rawmode in _LOW_BYTES:
        del image  # 200 MB, if the picture is as large as is read
        samples = _join_bytes(samples, data, rawmode)
    values, remarks = grey(samples)
    return values, remarks, Stored.of(values)


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
    joined = high.astype(np.uint16)
    joined <<= 8
    joined |= low
    return joined


def grey(samples: np.ndarray) -> tuple[np.ndarray, list[str]]:
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
