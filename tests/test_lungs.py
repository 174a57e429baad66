"""Post-processing, masks at other sizes, and the warnings they give."""

import numpy as np
import pytest
import torch

from manet_core.lungs import Lungs, clean_mask, mask_warnings, predict_lungs, sides
from manet_core.phantom import phantom_mask
from manet_core.preprocess import resize, segmented_lungs, to_unit_range


def test_clean_mask_fills_holes_and_removes_small_objects():
    mask = np.zeros((100, 100), bool)
    mask[10:60, 10:40] = True
    mask[20:30, 20:30] = False  # a hole
    mask[90:95, 90:95] = True  # 25 pixels, a quarter of a percent
    mask[70:85, 60:80] = True  # 300 pixels, 3 %
    cleaned = clean_mask(mask)
    expected = np.zeros((100, 100), bool)
    expected[10:60, 10:40] = expected[70:85, 60:80] = True
    np.testing.assert_array_equal(cleaned, expected)
    assert mask[90, 90], "the argument is left as it was"


def test_a_mask_at_another_size_keeps_what_cleaning_did():
    probability = np.zeros((56, 56), np.float32)
    probability[10:40, 8:24] = probability[10:40, 32:48] = 0.9
    probability[20:24, 12:16] = 0.1  # a hole, to be filled
    probability[50:53, 50:53] = 0.9  # a speck, to be removed
    lungs = Lungs.from_probability(probability)
    raw, cleaned = lungs.raw_at((448, 224)), lungs.at((448, 224))
    assert raw.shape == cleaned.shape == (448, 224) and raw.dtype == cleaned.dtype == bool
    assert not raw[22 * 8, 14 * 4] and cleaned[22 * 8, 14 * 4]
    assert raw[51 * 8, 51 * 4 - 1] and not cleaned[45 * 8 :].any()
    assert cleaned.mean() == pytest.approx(lungs.cleaned.mean(), rel=0.05)


def test_at_the_segmenters_own_size_the_mask_is_what_was_cleaned_and_nearby_it_is_interpolated(rng):
    probability = rng.random((64, 64), np.float32) * 0.4 + np.where(phantom_mask(64), 0.5, 0).astype(np.float32)
    lungs = Lungs.from_probability(probability)
    assert lungs.at(64) is lungs.cleaned and (lungs.raw_at(64) == (probability > 0.5)).all()
    edited = np.where(lungs.cleaned == (probability > 0.5), probability, lungs.cleaned.astype(np.float32))
    for size in (48, 73):
        np.testing.assert_array_equal(lungs.at(size), resize(edited, size) > 0.5)


def test_an_enlarged_outline_is_smooth_and_where_it_was():
    """A disc that was predicted as pixels, steps and all, is round to a quarter of a pixel when enlarged tenfold."""
    y, x = np.mgrid[:56, :56] - 27.5
    disc = np.hypot(y, x) < 20
    lungs = Lungs.from_probability(disc.astype(np.float32))
    y, x = (np.mgrid[:560, :560] - 279.5) / 10
    distance = np.hypot(y, x)
    for mask in (lungs.at(560), lungs.raw_at(560)):
        assert not mask[distance > 20.25].any() and mask[distance < 19.75].all()


def test_predict_lungs_scales_to_the_unit_range():
    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward_features(self, x):
            self.seen = x
            return [x]

        def forward_head(self, levels):
            return levels[-1] - 0.5

    spy = Spy()
    picture = np.linspace(0.2, 0.6, 40_000, dtype=np.float32).reshape(200, 200)
    (lungs,) = predict_lungs(spy, [picture], 64)
    assert spy.seen.shape == (1, 1, 64, 64)
    assert spy.seen.min() == 0 and spy.seen.max() == pytest.approx(1)
    quarters = spy.seen[0, 0].reshape(2, 32, 2, 32).mean((1, 3))
    assert lungs.features.shape == (1, 2, 2) and lungs.features[0] == pytest.approx(quarters.numpy())
    assert lungs.probability.shape == (64, 64) and lungs.cleaned[40:].all() and not lungs.cleaned[:24].any()


def test_segmented_lungs_spans_minus_one_to_one_and_is_black_outside(rng):
    picture, mask = rng.random((32, 32)).astype(np.float32), phantom_mask(32)
    out = segmented_lungs(picture, mask)
    assert out.dtype == np.float32 and out.min() == -1 and out.max() == 1
    assert (out[~mask] == -1).all()
    inside = picture[mask]
    np.testing.assert_allclose(out[mask], 2 * inside / inside.max() - 1, atol=1e-6)
    assert (segmented_lungs(picture, np.zeros_like(mask)) == -1).all()


def test_resize_is_exact_on_ramps_and_averages_when_it_shrinks(rng):
    ramp = np.tile(np.arange(64, dtype=np.float32), (64, 1))
    np.testing.assert_allclose(resize(ramp, (32, 32))[16, 8:24], ramp[0, ::2][8:24] + 0.5, atol=1e-4)
    noise = rng.random((512, 512)).astype(np.float32)
    assert resize(noise, 32).std() < 0.1 * noise.std(), "antialiased"
    assert resize(noise, (512, 512)) is noise
    assert to_unit_range(np.full((4, 4), 3.0, np.float32)).max() == 0


def test_sides_part_the_lungs_where_there_is_least_of_them():
    mask = np.zeros((20, 40), bool)
    mask[5:15, 4:18] = mask[5:12, 22:36] = True
    apart = sides(mask)
    fused = mask.copy()
    fused[8, 18:22] = True
    for right, left in (apart, sides(fused)):
        assert right[:, :18].sum() == 140 and left[:, 22:].sum() == 98  # the patient's right is on the left
        assert not right[:, 22:].any() and not left[:, :18].any()
    alone = np.zeros((20, 40), bool)
    alone[5:15, 25:36] = True
    right, left = sides(alone)
    assert not right.any() and (left == alone).all()
    assert not any(side.any() for side in sides(np.zeros((4, 4), bool)))


def as_lungs(mask: np.ndarray, certainty: float = 0.99) -> Lungs:
    return Lungs(np.where(mask, certainty, 1 - certainty).astype(np.float32), mask)


def test_good_lungs_raise_no_warning():
    for seed in range(5):
        assert mask_warnings(as_lungs(phantom_mask(224, seed))) == []


def one_side(mask):
    mask[:, 112:] = False


def fragments(mask):
    mask[:] = False
    for y, x in ((20, 20), (20, 140), (90, 20), (90, 140), (160, 80)):
        mask[y : y + 45, x : x + 45] = True


def everywhere(mask):
    mask[:] = True


def nothing(mask):
    mask[:] = False


def small(mask):
    mask[:100] = mask[140:] = False


def off_the_frame(mask):
    mask[:, :60] = True
    mask[:, -60:] = True


def ragged(mask):
    mask &= np.indices(mask.shape)[0] % 8 < 6


@pytest.mark.parametrize(
    "change, words",
    [
        (one_side, "one side"),
        (fragments, "5 pieces"),
        (everywhere, "covers most"),
        (nothing, "Hardly any lung"),
        (small, "Little lung"),
        (off_the_frame, "runs out of the picture"),
        (ragged, "ragged"),
    ],
)
def test_bad_masks_are_named(change, words):
    mask = phantom_mask(224)
    change(mask)
    warnings = mask_warnings(as_lungs(mask))
    assert any(words in warning for warning in warnings)
    assert all(warning.endswith(".") for warning in warnings)


def test_doubt_and_much_cleaning_are_named():
    mask = phantom_mask(224)
    assert any("uncertain" in warning for warning in mask_warnings(as_lungs(mask, certainty=0.8)))
    raw = mask & (np.indices(mask.shape).sum(0) % 3 > 0)
    assert any("much cleaning" in warning for warning in mask_warnings(Lungs(raw.astype(np.float32), mask)))
