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
from manet_core.explain.gradcam import grad_cam, scale_maps
from manet_core.explain.library import BindMask
from manet_core.explain.progress import report, watched
from manet_core.networks.classifier import Classifier
from manet_core.phantom import phantom


@pytest.mark.parametrize("name", list_models())
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


def test_all_explainers_are_tested_and_the_default_comes_first():
    assert list_explainers() == list(LIBRARY)
    assert [name for name in LIBRARY if get_explainer(name).slow] == ["scorecam"]


@pytest.mark.parametrize("name", list_models())
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
