"""MANet end to end: one network of both stages, its gradient, and its training against the two stages."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, make_weights
from safetensors.torch import load_file
from torch.nn import functional as F

from manet_core import CLASSES, Pipeline, create_classifier, create_segmenter
from manet_core.explain import get_explainer
from manet_core.lungs import predict_lungs
from manet_core.networks import e2e
from manet_core.networks.registry import spec
from manet_core.phantom import phantom
from manet_core.preprocess import network_input, segmented_lungs
from manet_core.weights import load_network
from train import e2e as verb

NAME = "efficientnet_lite0_e2e"


@pytest.fixture
def small(monkeypatch):
    """The segmenter at 64×64 pixels, which takes a sixteenth of the time."""
    monkeypatch.setattr(e2e, "SIZE", 64)


@pytest.mark.parametrize("name", [NAME, "resnet34_e2e"])
def test_it_holds_both_stages_and_needs_no_mask(name, small):
    net = create_classifier(name).eval()
    parts = {"segmenter": create_segmenter(width=16, conventions=2)}
    parts["classifier"] = create_classifier(name.replace("e2e", "nma"))
    keys = {f"{part}.{key}": w.shape for part, stage in parts.items() for key, w in stage.state_dict().items()}
    assert {key: w.shape for key, w in net.state_dict().items()} == keys
    assert (spec(name).sees, spec(name).size, spec(name).uses_mask) == ("whole", 256, False)
    image = torch.rand(2, 1, 96, 128) * 2 - 1
    with torch.inference_mode():
        logits = net(image)
        features = net.forward_features(image)
        mask = net.predict_mask(image)
        assert torch.equal(net(image, torch.rand(2, 1, 96, 128)), logits)
        torch.testing.assert_close(net.forward_head(features), logits)
    assert logits.shape == (2, 5) and features.shape[2:] == (3, 4)
    assert mask.shape == image.shape and 0 <= mask.min() < mask.max() <= 1
    assert net.attention_maps(mask) == []


def two_stages(cls: type, weights) -> tuple[e2e.EndToEnd, torch.nn.Module, torch.nn.Module]:
    """A network of both stages with shipped weights, and the stages by themselves."""
    segmenter, classifier = load_network(weights, "resunet"), load_network(weights, "efficientnet_lite0_nma")
    net = cls("efficientnet_lite0", "e2e", 5, 1).eval()
    net.segmenter.load_state_dict(segmenter.state_dict())
    net.classifier.load_state_dict(classifier.state_dict())
    return net, segmenter, classifier


class Hardened(e2e.EndToEnd):
    """Without cleaning between the stages."""

    def between(self, mask, size):
        return (super().between(mask, size) > 0.5).float()


@pytest.mark.parametrize("cls, size", [(Hardened, 256), (verb.TwoStages, 224)])
def test_with_a_hard_mask_it_is_the_two_stages(cls, size, weights):
    net, segmenter, classifier = two_stages(cls, weights)
    picture = phantom(size, 1, opacity=1.0).pixels
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    (lungs,) = predict_lungs(segmenter, [picture], 256)
    mask = (lungs.raw_at(size) if cls is Hardened else lungs.at(size)).astype(np.float32)
    assert 0.1 < mask.mean() < 0.6
    seen = torch.from_numpy(segmented_lungs(picture, mask))[None, None]
    whole = torch.from_numpy(network_input(picture, mask, "whole", np.random.default_rng(0)))[None, None]
    with torch.inference_mode():
        torch.testing.assert_close(net.predict_mask(whole)[0, 0].numpy(), mask)
        torch.testing.assert_close(net(whole), classifier(seen, torch.from_numpy(mask)[None, None]), atol=1e-5, rtol=0)
    soft = two_stages(e2e.EndToEnd, weights)[0]
    with torch.inference_mode():  # the soft mask is another, if not by much
        assert 1e-5 < (soft.predict_mask(whole) - net.predict_mask(whole)).abs().mean() < 0.05


def test_the_diagnosis_has_a_gradient_for_the_mask(monkeypatch):
    """Cross entropy's gradient for the segmenter's weights is that of finite differences."""
    monkeypatch.setattr(e2e, "SIZE", 32)
    torch.manual_seed(0)
    net = create_classifier(NAME).double().eval()
    image, target = torch.rand(2, 1, 64, 64).double() * 2 - 1, torch.tensor([1, 3])

    def loss() -> torch.Tensor:
        return F.cross_entropy(net(image), target)

    loss().backward()
    for weight in (net.segmenter.stem.conv1.weight, net.segmenter.head.weight):
        direction, step = torch.randn_like(weight), 1e-6
        slope = (weight.grad * direction).sum().item()
        with torch.no_grad():
            weight += step * direction
            above = loss().item()
            weight -= 2 * step * direction
            below = loss().item()
            weight += step * direction
        assert abs(slope) > 1e-6
        assert (above - below) / (2 * step) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("name", ["hirescam", "layercam-finer"])
def test_explainers_look_at_the_classifier(name, small):
    net = create_classifier(NAME).eval().requires_grad_(False)
    image, mask = torch.rand(1, 1, 64, 64) * 2 - 1, torch.ones(1, 1, 64, 64)
    with torch.inference_mode():
        features = net.forward_features(image, mask)
    logits, maps = get_explainer(name).function(net, image, mask, features)
    assert logits.shape == (5,) and maps.shape == (5, *((4, 4) if "finer" in name else (2, 2)))
    assert maps.isfinite().all() and maps.min() >= 0


def test_the_pipeline_shows_it_the_whole_film(tmp_path, small):
    pipe = Pipeline.load(make_weights(tmp_path, {NAME: "manet"}, **{NAME: {"size": 64, "sees": "whole"}}))
    x = phantom(64, opacity=1.0)
    analysis = pipe.analyze(x)
    whole = network_input(x.pixels, analysis.mask, "whole", np.random.default_rng(0))
    with torch.inference_mode():
        expected = pipe.classifiers[NAME](torch.from_numpy(whole)[None, None]).softmax(1)[0]
    reading = analysis.readings[NAME]
    assert list(reading.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert reading.heatmaps.keys() == set(CLASSES)


# --- training -------------------------------------------------------------------------------------------------------

TINY = ["--size", 64, "--batch", 4, "--films", 4, "--epochs", 2, "--trials", 1, "--device", "cpu", "--precision", "no"]


def test_both_arms_train_resume_and_are_compared(run, phantoms, weights, tmp_path, small, monkeypatch):
    common = ["--data", phantoms, "--weights", weights, "--cache", tmp_path / "cache", *TINY]
    run(verb, *common, "--out", tmp_path / "whole", "--record", tmp_path / "results" / "e2e")
    results = json.loads((tmp_path / "results" / "e2e" / "results.json").read_text(encoding="utf-8"))
    assert (tmp_path / "whole" / "tables.md").read_text(encoding="utf-8") == verb.markdown(results)
    assert results["n"] == results["masks"] == 8 and results["films"] == 8
    assert list(results["systems"]) == [
        *("two stages, as shipped", "two stages, not fine-tuned", "two stages"),
        *("end to end, not fine-tuned", "end to end"),
    ]

    shipped = load_network(weights, "resunet").state_dict()
    for arm, stays in (("two-stage", True), ("joint", False)):
        learnt = load_file(tmp_path / "whole" / arm / "0" / "best.safetensors")
        same = [torch.equal(learnt[f"segmenter.{name}"], w) for name, w in shipped.items()]
        assert all(same) == stays, arm

    validations, read = iter((False, True)), verb.read

    def interrupted(*args):
        if next(validations):
            raise KeyboardInterrupt
        return read(*args)

    cut = [*common, "--arms", "joint", "--out", tmp_path / "cut"]
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="same command goes on"):
        patched.setattr(verb, "read", interrupted)
        run(verb, *cut)
    run(verb, *cut)
    whole, resumed = (
        torch.load(tmp_path / out / "joint" / "0" / "last.ckpt", weights_only=True)["net"] for out in ("whole", "cut")
    )
    assert all(torch.equal(w, resumed[name]) for name, w in whole.items())
    with pytest.raises(SystemExit, match="another dice: choose another --out"):
        run(verb, *cut, "--dice", 0.5)


def test_without_cross_entropy_only_the_segmenter_learns(run, phantoms, weights, tmp_path, small):
    common = ["--data", phantoms, "--weights", weights, "--cache", tmp_path / "cache", *TINY, "--arms", "joint"]
    run(verb, *common, "--epochs", 1, "--cross-entropy", 0, "--weight-decay", 0, "--out", tmp_path / "dice")
    trained = load_file(tmp_path / "dice" / "joint" / "0" / "best.safetensors")
    for stage, name, learns in (("segmenter", "resunet", True), ("classifier", "efficientnet_lite0_nma", False)):
        parameters = load_network(weights, name).named_parameters()
        same = [torch.equal(trained[f"{stage}.{parameter}"], w) for parameter, w in parameters]
        assert not any(same) if learns else all(same)


def test_figures_of_the_comparison(rng):
    labels, patients = np.repeat([0, 3], [30, 10]), np.arange(40).astype(str)

    def answer(right: np.ndarray, iou: float | None = None) -> dict:
        probabilities = np.eye(len(CLASSES))[np.where(right, labels, (labels + 1) % 5)]
        return {"probabilities": probabilities} | ({} if iou is None else {"iou": np.full(40, iou)})

    some, all_right = np.arange(40) < 30, np.ones(40, bool)
    found = verb.compare(
        {
            "two stages": [answer(some)],
            "end to end, not fine-tuned": [answer(some, 0.5)],
            "end to end": [answer(all_right, 0.6), answer(some, 0.7)],
        },
        labels,
        patients,
    )
    apart, together, less = found["systems"]["two stages"], found["systems"]["end to end"], found["differences"]
    assert (apart["accuracy"]["value"], apart["mean_sensitivity"]["value"]) == (0.75, 0.5)
    assert (together["accuracy"]["value"], together["mean_sensitivity"]["value"]) == (0.875, 0.75)
    assert (less["accuracy"]["value"], less["mean_sensitivity"]["value"]) == (0.125, 0.25)
    assert less["accuracy"]["low"] < 0.125 < less["accuracy"]["high"]
    assert together["iou"]["value"] == pytest.approx(0.65) and less["iou"]["value"] == pytest.approx(0.15)
    assert less["dice"]["value"] == pytest.approx((0.75 + 14 / 17) / 2 - 2 / 3)
    assert together["sensitivity"]["Bacterial pneumonia"]["n"] == 10


def test_what_cannot_be_trained_is_told_in_a_sentence(run, phantoms, weights, random_weights, tmp_path):
    common = ["--data", phantoms, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    with pytest.raises(SystemExit, match="efficientnet_lite0_e2e, resnet34_e2e"):
        run(verb, *common, "--model", "resnet34")
    with pytest.raises(SystemExit, match="--val and --test 0 or more"):
        run(verb, *common, "--test", -1)
    with pytest.raises(SystemExit, match="no weights for 'resnet34_nma'.*--start"):
        run(verb, *common, "--model", "resnet34_e2e", "--weights", weights)
    with pytest.raises(SystemExit, match="segmenter are missing, or not those"):
        run(verb, *common, "--weights", random_weights)
    with pytest.raises(SystemExit, match="classifier nowhere.safetensors are missing"):
        run(verb, *common, "--weights", weights, "--start", "nowhere.safetensors")


def test_the_recorded_tables_are_drawn_from_their_results():
    folder = ROOT / "results" / "e2e"
    figures = verb.markdown(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    assert (folder / "tables.md").read_text(encoding="utf-8") == figures
    assert figures in (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
