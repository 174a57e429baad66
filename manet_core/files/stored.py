"""What a film's file holds before any window: for a viewer, which lets its reader choose the window."""

from dataclasses import dataclass, field

import numpy as np

_MOST = 2**16 - 1
_BLOCK = 2**18  # pixels that are worked on at a time, as copies of a whole film may be 200 MB each


@dataclass(frozen=True)
class Stored:
    """The values of a file on their full range, as 16-bit levels.

    Of DICOM these are the values after the modality LUT or rescale, and where there is a VOI LUT or a sigmoid
    window, which no window could undo, after that. Whole numbers that span less than 65,536 are kept as they are; all
    else is brought to 65,536 steps.

    Attributes:
        levels: (H, W) uint16; the value of a pixel is `first + step * level`.
        first: the value of level 0.
        step: the difference of neighbouring levels, greater than 0.
        window: (low, high) values that are shown darkest and brightest at first, so that the picture is
            `XRay.pixels`; high is the greater.
        inverted: low values are bright, and high ones dark.
    """

    levels: np.ndarray = field(repr=False)
    first: float
    step: float
    window: tuple[float, float]
    inverted: bool = False

    @classmethod
    def of(
        cls,
        values: np.ndarray,
        window: tuple[float, float] | None = None,
        inverted: bool = False,
        outside: np.ndarray | None = None,
    ) -> "Stored | None":
        """The values (H, W) float32 of a picture; None where some are not finite.

        Args:
            values: left as they are.
            window: as above, cut here to the values that there are; None: all of them.
            inverted: as above.
            outside: (H, W) bool, pixels that are no part of the film and are shown dark; None: there are none.
        """
        used = True if outside is None else ~outside
        low, high = (float(bound) for bound in (
            values.min(where=used, initial=np.inf), values.max(where=used, initial=-np.inf)
        ))  # fmt: skip
        if not np.isfinite(high - low):
            return None
        rows = max(1, _BLOCK // values.shape[1])
        blocks = [slice(i, i + rows) for i in range(0, len(values), rows)]
        whole = high - low <= _MOST and all(np.array_equal(values[at], np.rint(values[at])) for at in blocks)
        step = 1.0 if whole else (high - low) / _MOST
        levels = np.empty(values.shape, np.uint16)
        for at in blocks:
            block = (values[at] - np.float32(low)) / np.float32(step)
            block += np.float32(0.5)
            levels[at] = block.clip(0, _MOST, out=block)
        if outside is not None:
            levels[outside] = round((high - low) / step) if inverted else 0
        first, last = (low, high) if window is None else (max(low, window[0]), min(high, window[1]))
        if first >= last:
            first, last = low, max(high, low + step)
        return cls(levels, low, step, (first, last), inverted)


@dataclass(frozen=True)
class Spacing:
    """The distance of neighbouring pixels' centres, by a DICOM header.

    Attributes:
        rows: millimetres from one row to the next.
        columns: millimetres from one column to the next.
        at_detector: it is the detector's (ImagerPixelSpacing): the body, nearer to the tube, is smaller than that says.
    """

    rows: float
    columns: float
    at_detector: bool
