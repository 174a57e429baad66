"""The synthetic chest: reproducible, in range, and with the lungs where its mask says."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, label

from manet_core.phantom import phantom, phantom_mask

SEEDS = range(6)


def test_the_same_seed_gives_the_same_picture_and_another_seed_another():
    assert np.array_equal(phantom(128, 3).pixels, phantom(128, 3).pixels)
    assert not np.array_equal(phantom(128, 3).pixels, phantom(128, 4).pixels)
    assert not np.array_equal(phantom_mask(128, 3), phantom_mask(128, 4))


@pytest.mark.parametrize("size", [64, 200, 512])
@pytest.mark.parametrize("opacity", [0.0, 1.0])
def test_pixels_fill_the_range_from_0_to_1(size, opacity):
    x = phantom(size, opacity=opacity)
    assert x.pixels.shape == (size, size) and x.pixels.dtype == np.float32
    assert x.pixels.min() == 0 and x.pixels.max() == pytest.approx(1)
    assert x.remarks == ("This is a synthetic drawing, not an X-ray of a person.",)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mask_is_two_lungs_inside_the_picture(seed):
    mask = phantom_mask(256, seed)
    assert mask.shape == (256, 256) and mask.dtype == bool
    assert 0.15 < mask.mean() < 0.40
    pieces, count = label(mask)
    assert count == 2
    left, right = mask[:, :128].sum(), mask[:, 128:].sum()
    assert 0.5 < right / left < 1  # the heart takes its place from the lung on the picture's right
    assert not (mask[0] | mask[-1] | mask[:, 0] | mask[:, -1]).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_lungs_are_darker_than_what_surrounds_them(seed):
    pixels, mask = phantom(256, seed).pixels, phantom_mask(256, seed)
    rim = binary_dilation(mask, iterations=8) & ~binary_dilation(mask, iterations=2)
    assert pixels[mask].mean() + 0.15 < pixels[rim].mean()
    assert pixels[250, 128] > 0.8  # spine below the diaphragm
    assert pixels[5, 5] < 0.1 and pixels[-5, 5] < 0.1  # beside the body


@pytest.mark.parametrize("seed", SEEDS)
def test_opacity_brightens_one_lower_lung_and_nothing_else(seed):
    mask = phantom_mask(256, seed)
    plain, half, full = (phantom(256, seed, opacity).pixels for opacity in (0.0, 0.5, 1.0))
    assert np.array_equal(plain[~mask], full[~mask])
    assert (full >= plain).all() and (full >= half).all()
    change = full - plain
    assert change.max() > 0.15
    rows, columns = np.nonzero(change > 0.5 * change.max())
    assert columns.max() < 128 and rows.mean() > 128


def test_a_picture_of_another_size_shows_the_same_chest():
    small, large = phantom_mask(128), phantom_mask(512)[::4, ::4]
    assert (small & large).sum() / (small | large).sum() > 0.95
