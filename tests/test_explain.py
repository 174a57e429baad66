"""Explainers: each against pytorch-grad-cam on the whole network, their registry, one from outside."""

import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from manet_core import Pipeline, create_classifier, list_models
from manet_core.__main__ import main
from manet_core.explain import get_explainer, list_explainers, register_explainer
from manet_core.explain.attribution import absent, superpixels
from manet_core.explain.gradcam import grad_cam, scale_maps
from manet_core.explain.library import BindMask
from manet_core.explain.progress import report, watched
from manet_core.networks.classifier import Classifier
from manet_core.networks.registry import spec
from manet_core.phantom import phantom, phantom_mask
from manet_core.preprocess import segmented_lungs

OURS = [name for name in list_models() if spec(name).attention != "guided"]  # timm's bodies: see test_guided.py


@pytest.mark.parametrize("name", OURS)
def test_equals_pytorch_grad_cam(name):
    torch.manual_seed(0)
    net = create_classifier(name).eval().requires_grad_(False)  # the library needs no gradient of the weights
    image = torch.randn(1, 1, 96, 96)  # Inception v3 needs at least 75
    mask = (torch.rand(1, 1, 96, 96) > 0.3).float()
    with torch.inference_mode():
        features = net.forward_features(image, mask)
    logits, maps = grad_cam(net, features)
    heatmaps = scale_maps(maps, 96)
    with GradCAM(BindMask(net, mask), [net.last_block]) as cam:
        for k in range(len(logits)):
            expected = cam(image.clone().requires_grad_(), [ClassifierOutputTarget(k)])[0]
            np.testing.assert_allclose(heatmaps[k], expected, atol=1e-4)
            torch.testing.assert_close(logits, cam.outputs[0].detach(), rtol=1e-4, atol=1e-5)


def test_one_forward_pass_of_the_trunk_and_no_gradient_left_behind():
    net = create_classifier("resnet34").eval()
    calls = []
    net.conv1.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        features = net.forward_features(torch.randn(1, 1, 64, 64))
    grad_cam(net, features)
    assert len(calls) == 1
    assert all(p.grad is None for p in net.parameters())


def test_an_empty_map_stays_zero_and_others_span_the_unit_range():
    maps = torch.zeros(2, 3, 3)
    maps[1, 1, 1] = 7
    heatmaps = scale_maps(maps, 30)
    assert heatmaps.dtype == np.float32 and heatmaps.shape == (2, 30, 30)
    assert not heatmaps[0].any()
    assert heatmaps[1].min() == 0 and heatmaps[1].max() == pytest.approx(1, abs=1e-5)


LIBRARY = {  # explainer: the class of the library and where it looks
    "gradcam": ("GradCAM", "last_block"),
    "hirescam": ("HiResCAM", "last_block"),
    "layercam": ("LayerCAM", "last_block"),
    "layercam-finer": ("LayerCAM", "finer_block"),
    "gradcam++": ("GradCAMPlusPlus", "last_block"),
    "eigencam": ("EigenCAM", "last_block"),
    "scorecam": ("ScoreCAM", "last_block"),
}


class Tiny(Classifier):
    """A network of 40 channels: Score-CAM asks once for each channel and class."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 40, 3, stride=16, padding=1)
        self.block = torch.nn.Sequential(torch.nn.Conv2d(40, 40, 3, stride=2, padding=1), torch.nn.ReLU())
        self.fc = torch.nn.Linear(40, classes)

    @property
    def last_block(self):
        return self.block

    @property
    def finer_block(self):
        return self.stem

    def forward_features(self, image, mask=None):
        return self.block(self.stem(image * mask))

    def forward_head(self, features):
        return self.fc(features.mean((2, 3)))


def build(model: str, classes: int) -> Classifier:
    net = Tiny(classes) if model == "tiny" else create_classifier(model, classes)
    return net.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "name, model",
    [(name, model) for name in LIBRARY if name != "scorecam" for model in ("resnet34_ma", "efficientnet_lite0_cbam")]
    + [("scorecam", "tiny")],
)
def test_every_explainer_equals_the_librarys(name, model, capfd):
    torch.manual_seed(0)
    side, classes = 96, 3
    net = build(model, classes)
    with torch.inference_mode():  # as the pipeline gives them
        image = torch.randn(1, 1, side, side)
        mask = (torch.rand(1, 1, side, side) > 0.3).float()
        features = net.forward_features(image, mask)
        plain = net.forward_head(features)[0]
    logits, maps = get_explainer(name).function(net, image, mask, features)
    assert maps.shape[0] == classes and maps.min() >= 0
    torch.testing.assert_close(logits, plain.clone(), rtol=1e-4, atol=1e-5)
    assert capfd.readouterr().err == "", "no progress bar of the library's"
    heatmaps = scale_maps(maps, side)
    method, layer = LIBRARY[name]
    with getattr(pytorch_grad_cam, method)(BindMask(net, mask.clone()), [getattr(net, layer)]) as cam:
        for k in range(classes):
            expected = cam(image.clone().requires_grad_(), [ClassifierOutputTarget(k)])[0]
            np.testing.assert_allclose(heatmaps[k], expected, atol=1e-4)
    assert heatmaps.max() > 0.9, "not all of them are empty"
    assert not net.last_block._forward_hooks and not net.finer_block._forward_hooks


def test_score_cam_shows_the_network_each_masked_picture_once_and_says_how_far_it_is():
    net, image, calls, shares = build("tiny", 3), torch.randn(1, 1, 96, 96), [], []
    features = net.forward_features(image, image)
    net.block.register_forward_hook(lambda *a: calls.append(len(a[2])))
    with watched(shares.append):
        get_explainer("scorecam").function(net, image, torch.ones_like(image), features)
    assert sorted(calls) == [1, 1, 1, 8, 16, 16], "the picture once for each class, its 40 maskings once in all"
    assert shares == pytest.approx([1 / 3, 2 / 3, 1])


CAPTUM = ["lime", "kernelshap", "gradientshap", "occlusion", "integratedgradients"]


def test_all_explainers_are_tested_and_the_default_comes_first():
    assert list_explainers() == [*LIBRARY, "attention", *CAPTUM]
    assert [name for name in list_explainers() if get_explainer(name).slow] == ["scorecam", *CAPTUM]


# --- captum ---------------------------------------------------------------------------------------------------------

SIDE = 28  # occluding windows of 4 pixels, 2 apart


class Signed(Classifier):
    """Logits (z, −z), so that one map has what speaks for z and the other what speaks against it; z is `score`'s."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward_features(self, image, mask=None):
        return image * mask

    def forward_head(self, features):
        z = self.score(features)[:, None]
        return torch.cat([z, -z], 1)


@pytest.fixture
def film() -> tuple[torch.Tensor, torch.Tensor]:
    """Two grey lungs of 10×20 pixels on black, and their mask; (1, 1, 28, 28) each."""
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 4:24, 3:13] = mask[..., 4:24, 15:25] = 1
    grey = 0.4 + 0.5 * torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return torch.where(mask > 0, grey, -1.0), mask


def signed(name: str, score, film) -> torch.Tensor:
    """What an explainer says of z, (28, 28): its map of z less that of −z, of which one is zero everywhere."""
    image, mask = film
    net = Signed(score).eval()
    with torch.inference_mode():
        features = net.forward_features(image, mask)
    logits, maps = get_explainer(name).function(net, image, mask, features)
    assert logits[0] == -logits[1] == score(image * mask)
    assert maps.shape == (2, SIDE, SIDE) and maps.min() >= 0 and not (maps[0] * maps[1]).any()
    return maps[0] - maps[1]


def weighted(weights: torch.Tensor):
    """A linear score, (B, 1, S, S) -> (B,)."""
    return lambda x: (x * weights).sum((1, 2, 3))


@pytest.fixture
def few(monkeypatch):
    """A quarter of the samples, where these are enough."""
    monkeypatch.setattr("manet_core.explain.attribution.SAMPLES", 100)


@pytest.fixture
def weights(film) -> torch.Tensor:
    """One weight a pixel, of both signs, outside the lungs, too; (28, 28)."""
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_what_is_black_is_not_replaced_and_all_else_has_one_grey(film):
    image, mask = film
    plain = absent(image)
    assert (plain[mask == 0] == -1).all() and plain[mask > 0].unique() == image[mask > 0].mean()
    assert absent(image, 0.25)[mask > 0].unique() == image[mask > 0].quantile(0.25)
    assert torch.equal(absent(torch.full_like(image, -1)), torch.full_like(image, -1))


def test_integrated_gradients_are_complete_and_those_of_a_polynomial(film):
    image, mask = film
    found = signed("integratedgradients", lambda x: (x**3).sum((1, 2, 3)), film)
    assert found.sum() == pytest.approx(float((image**3 * mask).sum() - (absent(image) ** 3 * mask).sum()), rel=1e-4)
    expected = (image**3 - absent(image) ** 3)[0, 0] * mask[
        0, 0
    ]  # each pixel's own share, as the score has no products
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradient_shap_is_the_weight_times_the_distance_to_the_drawn_greys(film, weights):
    image, mask = film
    found, inside = signed("gradientshap", weighted(weights), film), mask[0, 0] > 0
    assert not found[~inside].any()
    grey = (image[0, 0] - found / weights)[inside]  # the mean of those that were drawn
    assert grey.std() < 1e-4
    low, high = image[mask > 0].quantile(torch.tensor([0.3, 0.7]))
    assert low < grey.mean() < high


def test_occlusion_is_by_how_much_the_logit_falls_behind_each_window(film):
    image, mask = film
    score = lambda x: (x[..., 5, 6] * x[..., 20, 20] + x[..., 10, 16] ** 2)[:, 0]
    plain, empty = score(image * mask), absent(image)
    fall, windows = torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE)
    for top in range(0, SIDE - 3, 2):
        for left in range(0, SIDE - 3, 2):
            hidden, window = image.clone(), (slice(top, top + 4), slice(left, left + 4))
            hidden[0, 0][window] = empty[0, 0][window]
            fall[window] += plain - score(hidden * mask)
            windows[window] += 1
    torch.testing.assert_close(signed("occlusion", score, film), fall / windows, rtol=1e-4, atol=1e-6)


def pieces_of(image: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` (28, 28) over the superpixel of each pixel inside the lungs, (28, 28); 0 outside of them."""
    pieces, inside = superpixels(image)[0, 0], image[0, 0] > -1
    sums = torch.zeros(int(pieces.max()) + 1).index_add(0, pieces[inside], values[inside])
    return torch.where(inside, sums[pieces], 0)


def test_superpixels_cut_the_lungs_alone_into_about_as_many_as_asked(film):
    image, mask = film
    pieces = superpixels(image)
    assert pieces.shape == image.shape and not pieces[mask == 0].any()
    counts = pieces[mask > 0].bincount()
    assert 20 <= len(counts) <= 40 and (counts > 0).all(), "numbered without a gap"


def test_kernel_shap_gives_a_sum_of_superpixels_its_terms(film, weights, few):
    image, mask = film
    effect = pieces_of(image, weights * (image - absent(image))[0, 0])
    torch.testing.assert_close(signed("kernelshap", weighted(weights), film), effect, rtol=1e-3, atol=1e-4)


def test_kernel_shap_gives_a_product_of_two_superpixels_to_both_alike(film):
    """By Shapley's symmetry; and by completeness the two halves are all that the product gains."""
    image, mask = film
    pieces, change = superpixels(image)[0, 0], (image - absent(image))[0, 0]
    first, second = (int(pieces[10, column]) for column in (5, 20))
    terms = [(pieces == piece) * change.sign() * (image[0, 0] > -1) for piece in (first, second)]
    parts = lambda x: [(term * (x[:, 0] - absent(image)[0, 0])).sum((1, 2)) for term in terms]
    score = lambda x: 100 * parts(x)[0] * parts(x)[1]
    gain = float(score(image * mask))
    found = signed("kernelshap", score, film)
    shares = [float(found[pieces == piece].max()) for piece in (first, second)]
    assert shares == pytest.approx([gain / 2] * 2, rel=0.1)
    sums = sum(float(found[(pieces == piece) & (image[0, 0] > -1)][0]) for piece in pieces[image[0, 0] > -1].unique())
    assert sums == pytest.approx(gain, rel=1e-3)


def test_lime_is_the_weighted_ridge_regression_of_its_authors(film, weights, few):
    image, mask = film
    found = signed("lime", weighted(weights), film)
    pieces, inside = superpixels(image)[0, 0], image[0, 0] > -1
    count, empty = int(pieces.max()) + 1, absent(image)
    present = torch.randint(0, 2, (100, count), generator=torch.Generator().manual_seed(0))
    present[0] = 1
    shown = torch.where(present[:, pieces] == 1, image[:, 0], empty[:, 0])
    y = ((shown * mask[:, 0]) * weights).sum((1, 2)).double()
    near = torch.exp(-((1 - present.double().mean(1).sqrt()) ** 2) / (2 * 0.25**2))
    x = present.double()
    x_mean, y_mean = (near @ x) / near.sum(), (near @ y) / near.sum()
    gram = ((x - x_mean) * near[:, None]).T @ (x - x_mean) + torch.eye(count)
    slope = torch.linalg.solve(gram, ((x - x_mean) * near[:, None]).T @ (y - y_mean))
    expected = torch.where(inside, slope.float()[pieces], 0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CAPTUM)
def test_captums_explainers_draw_the_same_each_time_touch_no_generator_and_say_how_far_they_are(name, few):
    net, shares = build("tiny", 3), []
    image, mask = phantom_input()
    features = net.forward_features(image, mask)
    explain = get_explainer(name).function
    with watched(shares.append):
        logits, maps = explain(net, image, mask, features)
    torch.testing.assert_close(logits, net.forward_head(features)[0])
    assert maps.shape == (3, 64, 64) and maps.amax((1, 2)).max() > 0
    assert shares == sorted(shares) and len(shares) > 5 and shares[-1] == 1
    torch.manual_seed(5), np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = explain(net, image, mask, features)[1]
    assert torch.equal(again, maps), "whatever the seed"
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    black = explain(net, torch.full_like(image, -1), mask, features)[1]
    assert black.max() < 1e-6, "where there is nothing to see, nothing speaks for a class"


def phantom_input() -> tuple[torch.Tensor, torch.Tensor]:
    """A phantom's lungs and mask as a network of 64×64 pixels is shown them, (1, 1, 64, 64) each."""
    mask = phantom_mask(64, 0) > 0
    picture = segmented_lungs(phantom(64, 0, opacity=1.0).pixels, mask)
    return tuple(torch.from_numpy(array.astype(np.float32))[None, None] for array in (picture, mask))


@pytest.mark.parametrize("name", ["lime", "occlusion"])
def test_the_same_changed_pictures_are_shown_to_the_network_once_for_all_classes(name, few):
    net, shown = build("tiny", 3), []
    image, mask = phantom_input()
    features = net.forward_features(image, mask)
    net.block.register_forward_hook(lambda *a: shown.append(len(a[2])))
    get_explainer(name).function(net, image, mask, features)
    assert sum(shown) == {"lime": 100, "occlusion": 1 + 15**2}[name]


def test_the_mask_is_no_part_of_what_is_replaced(film, few):
    """A network that looks at the mask alone: no picture changes what it says."""
    image, mask = film
    net = Signed(lambda x: x.sum((1, 2, 3)))
    net.forward_features = lambda image, mask=None: mask + 0 * image
    for name in CAPTUM:
        maps = get_explainer(name).function(net, image, mask, mask)[1]
        assert maps.abs().max() < 1e-3, name


# --- a network's own attention --------------------------------------------------------------------------------------


class Attending(Classifier):
    """Attends to two layers, of which one is coarser."""

    attention = "attn2"
    fine = torch.tensor([[0.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 0], [0, 0, 0, 0]])[None, None]
    coarse = torch.full((1, 1, 2, 2), 0.25)

    def forward_head(self, features):
        return features.mean((2, 3))

    def local_attention(self, image, mask=None):
        return [self.coarse, self.fine]


def test_attention_is_the_mean_over_layers_at_the_finest_grid_for_every_class():
    net, image = Attending(), torch.randn(1, 1, 32, 32)
    features = torch.randn(1, 3, 4, 4)
    logits, maps = get_explainer("attention").function(net, image, image, features)
    assert torch.equal(logits, features.mean((2, 3))[0]) and maps.shape == (3, 4, 4)
    assert all(torch.equal(each, maps[0]) for each in maps)
    torch.testing.assert_close(maps[0], (net.fine[0, 0] + 1 / 16) / 2)
    assert maps[0].sum() == pytest.approx(1)


def test_attention_of_alexnet_comes_from_its_own_forward_pass():
    torch.manual_seed(0)
    net, image = create_classifier("alexnet_attn2", 2).eval(), torch.randn(1, 1, 96, 96)
    features = net.forward_features(image)
    logits, maps = get_explainer("attention").function(net, image, torch.ones_like(image), features)
    torch.testing.assert_close(logits, net(image)[0])
    torch.testing.assert_close(maps[1], torch.cat(net.local_attention(image)).mean(0)[0])


def test_an_explainer_that_does_not_suit_a_network_is_refused_in_a_sentence(random_weights, picture, tmp_path, capsys):
    attention = get_explainer("attention")
    suited = {name for name in ("alexnet", "alexnet_attn1", "alexnet_attn3", "vgg16") if attention.suits(meta(name))}
    assert suited == {"alexnet_attn1", "alexnet_attn3"}
    with pytest.raises(ValueError, match="no attention maps of its own; choose another"):
        attention.function(build("tiny", 2), *[torch.zeros(1, 1, 64, 64)] * 2, torch.zeros(1, 40, 2, 2))
    pipe = Pipeline.load(random_weights, ["efficientnet_lite0", "efficientnet_lite0_ma"])
    sentence = r"^The explainer 'attention' does not suit efficientnet_lite0, efficientnet_lite0_ma; choose [^.]*\.$"
    with pytest.raises(ValueError, match=sentence):
        pipe.analyze(phantom(64), explainer="attention")
    assert pipe.analyze(phantom(64), models=[], explainer="attention").readings == {}
    arguments = ["analyze", str(picture), "--out", str(tmp_path / "out"), "--weights", str(random_weights)]
    assert main([*arguments, "--explainer", "attention"]) == 2
    assert capsys.readouterr().err.startswith("The explainer 'attention' does not suit")
    assert not (tmp_path / "out").exists()


def meta(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        return create_classifier(name)


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_the_finer_block_has_twice_the_resolution(name):
    with torch.device("meta"):
        net = create_classifier(name)
        image, sizes = torch.zeros(1, 1, 224, 224), {}
        for block in ("last_block", "finer_block"):
            getattr(net, block).register_forward_hook(lambda *a, block=block: sizes.update({block: a[2].shape[-1]}))
        net(image, image)
    assert sizes["finer_block"] // 2 in (sizes["last_block"], sizes["last_block"] + 1)  # Inception pads nothing


@pytest.fixture
def centre(monkeypatch):
    """An explainer from outside, registered for one test."""

    def explain(net, image, mask, features):
        report(0.5)
        logits = net.forward_head(features)[0]
        maps = torch.zeros(len(logits), 3, 3)
        maps[:, 1, 1] = 2
        return logits, maps

    monkeypatch.setattr("manet_core.explain._EXPLAINERS", {n: get_explainer(n) for n in list_explainers()})
    return register_explainer("centre", "The centre", explain, slow=True)


def test_an_explainer_from_outside_goes_all_the_way(centre, many_tasks, picture, tmp_path, capsys):
    steps, pipe = [], Pipeline.load(many_tasks)
    analysis = pipe.analyze(phantom(100), explainer="centre", progress=lambda *step: steps.append(step))
    assert steps == [(done / 2, 4) for done in range(1, 9)]
    assert analysis.explainer == analysis.to_dict()["explainer"] == "centre"
    for reading in analysis.readings.values():
        assert reading.native == (3, 3) and set(reading.peaks.values()) == {2}
        for heatmap in reading.heatmaps.values():
            assert heatmap[32, 32] > 0.9 and not heatmap[:8].any()
    arguments = ["analyze", str(picture), "--out", str(tmp_path), "--weights", str(many_tasks)]
    assert main([*arguments, "--explainer", "centre"]) == 0
    assert "The centre" in capsys.readouterr().err, "a slow one shows its progress"
    assert main([*arguments, "--explainer", "nonsense"]) == 2
    assert "choose one of: gradcam, hirescam" in capsys.readouterr().err
    with pytest.raises(ValueError, match="already"):
        register_explainer("centre", "Another", centre.function)


def test_an_unknown_explainer_is_refused_with_the_choices(random_weights):
    pipe = Pipeline.load(random_weights, ["efficientnet_lite0"])
    for call in (pipe.analyze, lambda *a, **k: next(pipe.analyze_many([*a], **k))):
        with pytest.raises(ValueError, match="nonsense.*choose one of: gradcam, .*scorecam"):
            call(phantom(64), explainer="nonsense")
