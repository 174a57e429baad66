"""A synthetic chest: drawn by a few formulas, owned by nobody, for examples and tests.

Path lengths through simple bodies (torso, lungs, heart, bones, vessels) are
added up and exposed as on film. It shows the pipeline's path and proves
nothing about its accuracy. Coordinates run from −1 to 1, y downwards; the
patient's right is on the picture's left.
"""

from dataclasses import dataclass

import numpy as np

from .files.xray import XRay

PLACES = {  # of a shadow, by the patient's sides: (x, y from the right diaphragm's dome, strength) of each spot
    "lower right": [(-0.45, -0.20, 1.0)],
    "upper left": [(0.43, -0.68, 1.8)],
    "both sides": [(-0.45, -0.20, 1.0), (0.56, -0.42, 1.8)],
    "behind the heart": [(0.17, -0.16, 0.3)],
}


@dataclass(frozen=True)
class _Chest:
    """The soft parts of one person: path lengths (size, size), 0 outside each part and about 1 at its thickest."""

    torso: np.ndarray
    cavity: np.ndarray  # of the ribs
    heart: np.ndarray  # and mediastinum
    abdomen: np.ndarray
    apex: float  # y of the lungs' tops
    dome: float  # y of the right diaphragm
    width: float  # of the rib cage; 1 is average
    tilt: float  # of the ribs; 1 is average

    @classmethod
    def draw(cls, size: int, seed: int) -> "_Chest":
        vary = np.random.default_rng(seed).uniform(-1, 1, 5)
        width, tilt, girth = 1 + 0.06 * vary[0], 1 + 0.10 * vary[1], 1 + 0.08 * vary[2]
        apex, dome = -0.72 + 0.03 * vary[3], 0.42 + 0.05 * vary[4]
        x, y = _grid(size)
        far = np.abs(x)

        flank = 0.84 * width + 0.30 / (1 + np.exp((y + 0.40) / 0.08))
        shoulder = -0.90 + 0.22 * x**2 - 0.26 * np.exp(-((x / 0.40) ** 2))
        along, across = _turn(far - 1.13, y + 0.16, 68)
        parts = (
            _root(1 - (x / flank) ** 2) * _root((y - shoulder) / 0.55),
            0.75 * _root(1 - (along / 0.66) ** 2 - (across / 0.30) ** 2),  # arm
            0.80 * _root(1 - (x / (0.25 + 1.5 * np.clip(y + 1, 0, 1) ** 2)) ** 2) * (y < -0.4),  # neck
        )
        torso = np.maximum.reduce(np.broadcast_arrays(*parts))

        u = far - 0.30
        half_width = np.where(u > 0, 0.41 * width, 0.25)
        half_height = np.where(y > 0.34, 0.75, 0.34 - apex)
        cavity = _root(1 - np.abs(u / half_width) ** 2.2 - np.abs((y - 0.34) / half_height) ** 2.2)

        along, across = _turn(x - 0.09, y - dome + 0.18, 36)
        levels = (
            1 - (along / (0.36 * girth)) ** 2 - (across / (0.26 * girth)) ** 2,
            1 - ((x - 0.005) / 0.10) ** 2 + 0 * y,  # spine and great vessels
            1 - ((x - 0.08) / 0.10) ** 2 - ((y + 0.31) / 0.13) ** 2,  # aortic knob
            1 - ((x - 0.08) / 0.11) ** 2 - ((y + 0.10) / 0.17) ** 2,  # pulmonary trunk
            1 - ((x + 0.06) / 0.085) ** 2 - ((y + 0.15) / 0.55) ** 2,  # superior vena cava
        )
        heart = _root(np.log(sum(np.exp(6 * np.maximum(level, -2)) for level in levels)) / 6)
        rim = dome + np.where(x > 0, 0.06, 0) + 0.27 * np.abs((far - 0.27) / (0.43 * width)) ** 2.2
        return cls(torso, cavity, heart, _root((y - rim) / 0.10), apex, dome, width, tilt)

    @property
    def lungs(self) -> np.ndarray:
        """Where lung is neither behind the heart nor behind the diaphragm, bool."""
        from skimage.morphology import remove_small_objects  # see `phantom`

        free = (self.cavity > 0) & (self.heart == 0) & (self.abdomen == 0)
        return remove_small_objects(free, max_size=free.size // 100)  # slivers below the heart

    @property
    def air(self) -> np.ndarray:
        """Path length through air; a little of it lies behind the heart and the diaphragm."""
        return np.clip(self.cavity - 0.8 * self.heart - 1.3 * self.abdomen, 0, 1)

    def wall(self, y: np.ndarray) -> np.ndarray:
        """Distance of the rib cage's side from the midline at height y."""
        reach = np.clip(1 - np.abs((y - 0.34) / np.where(y > 0.34, 0.75, 0.34 - self.apex)) ** 2.2, 0, 1)
        return 0.30 + 0.41 * self.width * reach ** (1 / 2.2)


def phantom(
    size: int = 512, seed: int = 0, opacity: float = 0.0, place: str = "lower right", marker: bool = False
) -> XRay:
    """A drawing of a frontal chest X-ray.

    Args:
        size: side of the square picture, in pixels.
        seed: varies proportions, vessels and noise.
        opacity: 0 to 1, strength of a cloudy shadow.
        place: where the shadow is, one of `PLACES`; the default is on the picture's left.
        marker: draw the letter L, white, beside the patient's left shoulder.

    Returns:
        XRay with (size, size) pixels; call `phantom_mask` for its lungs.

    Raises:
        ValueError: there is no such place.
    """
    from scipy.ndimage import gaussian_filter  # not before: no start need wait for it

    if place not in PLACES:
        raise ValueError(f"There is no place {place!r} for a shadow; choose one of: {', '.join(PLACES)}.")
    chest, rng = _Chest.draw(size, seed), np.random.default_rng([seed, 1])
    x, y = _grid(size)
    air = chest.air
    bubble = _root(1 - ((x - 0.33) / 0.13) ** 2 - ((y - chest.dome - 0.19) / 0.06) ** 2)
    trachea = _root(1 - ((x + 0.01) / 0.04) ** 2) / (1 + np.exp((y + 0.30) / 0.04))
    fine = 0.0022 * size
    bones = gaussian_filter(_tubes(size, _bones(chest)) + _spine(size), fine)
    vessels = gaussian_filter(_tubes(size, _vessels(rng)), fine)
    hila = sum(np.exp(-(((x - h) / 0.07) ** 2) - ((y + 0.02 + h / 6) / 0.13) ** 2) for h in (-0.17, 0.19))
    tissue = 2.0 * chest.torso - 1.35 * air + 0.15 * chest.abdomen - 0.25 * bubble - 0.35 * trachea
    exposure = np.exp(-tissue - bones - (vessels + 0.25 * hila) * air)
    scatter = gaussian_filter(exposure, 0.05 * size, truncate=2)
    density = -np.log(0.94 * exposure + 0.06 * scatter) + 0.02 * gaussian_filter(rng.normal(0, 1, (size, size)), 0.6)
    healthy = _film(density)
    low, high = healthy.min(), healthy.max()  # the scale is the same for every opacity
    where = ~chest.lungs & (chest.cavity > 0) if place == "behind the heart" else chest.lungs
    film = _film(density + opacity * _shadow(chest, rng, place) * where) if opacity else healthy
    picture = np.clip((film - low) / (high - low), 0, 1).astype(np.float32)
    if marker:
        stroke = (np.abs(x - 0.845) < 0.011) & (np.abs(y + 0.83) < 0.07)
        picture[stroke | ((np.abs(x - 0.875) < 0.041) & (np.abs(y + 0.771) < 0.011))] = 1
    return XRay(picture, ("This is a synthetic drawing, not an X-ray of a person.",))


def phantom_mask(size: int = 512, seed: int = 0) -> np.ndarray:
    """The phantom's lungs without what lies behind heart and diaphragm, (size, size) bool."""
    return _Chest.draw(size, seed).lungs


def _film(density: np.ndarray) -> np.ndarray:
    """Brightness from 0 to 1 on a film's S-shaped curve."""
    return 1 / (1 + np.exp((1.15 - density) / 0.60))


def _shadow(chest: _Chest, rng: np.random.Generator, place: str) -> np.ndarray:
    """Cloudy density (size, size) that fills air in a place of the lungs, or lies behind the heart."""
    from skimage.transform import resize  # see `phantom`

    shape = chest.torso.shape
    x, y = _grid(len(chest.torso))
    clouds = sum(resize(rng.normal(0, 4 / n, (n, n)), shape, order=3) for n in (8, 16, 32))
    spot = sum(
        strength * np.exp(-(((x - across) / 0.19) ** 2) - ((y - chest.dome - down) / 0.19) ** 2)
        for across, down, strength in PLACES[place]
    )
    filled = chest.cavity if place == "behind the heart" else chest.air
    return 1.5 * spot * np.clip(0.7 + 0.4 * clouds, 0, 1) * filled


def _bones(chest: _Chest) -> list:
    """Ribs, clavicles, shoulder blades and upper arms, as `_tubes` takes them."""
    t = np.linspace(0, 1, 600)
    s = 1 - t
    tubes = []
    for side in (-1, 1):
        for k in range(10):  # a rib is a tilted ring around the chest, seen from the front
            turn = 0.12 + t * (0.69 - 0.012 * k) * np.pi
            y = chest.apex - 0.05 + 0.114 * k + chest.tilt * (0.19 + 0.028 * k) * (1 - np.cos(turn))
            wall = chest.wall(y) + 0.008
            tubes.append((side * wall * np.sin(turn), y, 0.5 * np.cos(turn), 0.010, 0.028, 0.27 * (1 - t**8)))
        for points, radius, wall in (
            ([(0.07, -0.55), (0.28, -0.54), (0.42, -0.76), (0.74, -0.74)], 0.026, 0.42),  # clavicle
            ([(0.70, -0.64), (0.60, -0.45), (0.62, -0.25), (0.68, -0.02)], 0.010, 0.25),  # shoulder blade, inner edge
            ([(0.68, -0.02), (0.76, -0.20), (0.80, -0.40), (0.84, -0.52)], 0.016, 0.35),  # outer edge
            ([(0.62, -0.58), (0.72, -0.66), (0.80, -0.74), (0.90, -0.74)], 0.020, 0.30),  # spine
            ([(0.93, -0.58), (0.99, -0.40), (1.08, -0.15), (1.17, 0.1)], 0.05 + 0.04 * np.exp(-8 * t), 0.35),  # arm
        ):
            x, y = np.transpose(points) @ (s**3, 3 * s**2 * t, 3 * s * t**2, t**3)  # a Bézier curve
            tubes.append((side * x, y, 0 * t, radius, radius, wall))
    return tubes


def _spine(size: int) -> np.ndarray:
    """Vertebrae with discs between them and a pair of pedicles each, (size, size)."""
    x, y = _grid(size)
    level = np.cos(2 * np.pi * (y + 0.02 * y**2) / 0.118)
    body = 0.25 * _root(1 - (x / (0.078 + 0.006 * level)) ** 2) * (1 + 0.25 * np.tanh(3 * level))
    ring = np.hypot((np.abs(x) - 0.048) / 0.014, 2.2 * (1 - level))
    return body + 0.10 * np.exp(-((ring - 1) ** 2) * 3) + 0.10 * np.exp(-((x / 0.014) ** 2) - 2 * (1 + level))


def _vessels(rng: np.random.Generator) -> list:
    """Arteries and veins that branch from the hila, as `_tubes` takes them."""
    tubes = []

    def grow(x, y, angle, radius, length):
        t = np.linspace(0, 1, 30)
        heading = angle + rng.normal(0, 0.4) * t
        xs, ys = x + length * np.cumsum(np.cos(heading)) / 30, y + length * np.cumsum(np.sin(heading)) / 30
        tubes.append((xs, ys, 0 * t, radius * (1 - 0.3 * t), radius * (1 - 0.3 * t), 0.4))
        if radius > 0.0042:
            for fork, share in ((rng.uniform(-0.5, -0.2), 0.72), (rng.uniform(0.2, 0.5), 0.6)):
                grow(xs[-1], ys[-1], heading[-1] + fork, radius * share, length * rng.uniform(0.65, 0.95))

    for side in (-1, 1):
        for angle in (-75, -50, -20, 10, 38, 60, 76):
            heading = np.radians(angle + rng.normal(0, 6))
            start = -0.02 - 0.03 * side + 0.10 * np.sin(heading)
            outwards = heading if side > 0 else np.pi - heading
            grow(0.15 * side, start, outwards, rng.uniform(0.010, 0.015), rng.uniform(0.14, 0.20))
    return tubes


def _tubes(size: int, tubes: list) -> np.ndarray:
    """Path lengths (size, size) through the walls of tubes (x, y, z, half width, half height, wall).

    x, y, z is the tube's curve; half width and half height are those of its cross-section in the picture.
    """
    rows = []
    for x, y, z, half_width, half_height, wall in tubes:
        step = np.sqrt(np.gradient(x) ** 2 + np.gradient(y) ** 2 + np.gradient(z) ** 2)
        amount = wall * step * np.maximum(half_width, half_height)
        rows.append(np.broadcast_arrays(x, y, half_width, half_height, amount))
    x, y, half_width, half_height, weight = np.concatenate(rows, axis=1, dtype=np.float32)[:, :, None]
    around = np.arange(32, dtype=np.float32) / 32 + np.arange(len(x), dtype=np.float32)[:, None] * 0.618 % 1
    column = ((x + half_width * np.cos(2 * np.pi * around) + 1) * (size / 2)).astype(np.int32)
    row = ((y + half_height * np.sin(2 * np.pi * around) + 1) * (size / 2)).astype(np.int32)
    inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    weight = np.broadcast_to(weight * (size / 2) ** 2 / 32, inside.shape)
    return np.bincount((row * size + column)[inside], weight[inside], size**2).reshape(size, size)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y from −1 to 1, (1, size) and (size, 1)."""
    line = np.linspace(-1, 1, size)
    return line[None, :], line[:, None]


def _root(value: np.ndarray) -> np.ndarray:
    """Square root of what lies between 0 and 1: the profile of a round body."""
    return np.sqrt(np.clip(value, 0, 1))


def _turn(x: np.ndarray, y: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along and across an axis that points `degrees` below the horizontal."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return c * x + s * y, c * y - s * x
