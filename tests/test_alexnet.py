"""AlexNet with attention: the equations against slow arithmetic, its two ways to answer, its training."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_weights
from torch.nn import functional as F

from manet_core import Pipeline, create_classifier
from manet_core.lungs import Lungs
from manet_core.networks.registry import spec
from manet_core.phantom import phantom
from manet_core.tasks import get_task
from train import alexnet
from train.classify import class_loss
from train.recipe import RECIPES, Run

LAYERS = {"alexnet_attn1": [4], "alexnet_attn2": [3, 4], "alexnet_attn3": [2, 3, 4]}


@pytest.fixture(scope="module")
def image():
    return torch.rand(2, 1, 99, 99, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", LAYERS)
def test_attention_is_jetleys(name, image):
    """s = ⟨f, g⟩, α = softmax(s), O = Σ α f, all O → 128 ReLU → 1 logit: one place after another."""
    torch.manual_seed(0)
    net = create_classifier(name).eval()
    with torch.inference_mode():
        outputs, x = {}, image
        for number in range(1, 6):
            x = getattr(net, f"conv{number}")(x)
            x = F.max_pool2d(x, 3, 2) if number < 3 else x
            outputs[number] = x
        maps, summed = net.local_attention(image), []
        assert len(maps) == len(LAYERS[name])
        for layer, alpha in zip(LAYERS[name], maps):
            f = net.project[str(layer)](outputs[layer]).double().numpy()
            g = outputs[5].double().numpy().mean((2, 3))
            batch, channels, height, width = f.shape
            expected, total = np.zeros((batch, 1, height, width)), np.zeros((batch, channels))
            for b in range(batch):
                scores = {(i, j): f[b, :, i, j] @ g[b] for i in range(height) for j in range(width)}
                most = max(scores.values())
                whole = sum(np.exp(score - most) for score in scores.values())
                for (i, j), score in scores.items():
                    expected[b, 0, i, j] = np.exp(score - most) / whole
                    total[b] += expected[b, 0, i, j] * f[b, :, i, j]
            np.testing.assert_allclose(alpha, expected, atol=1e-5)
            torch.testing.assert_close(alpha.sum((1, 2, 3)), torch.ones(2))
            summed.append(torch.from_numpy(total).float())
        hidden, _, last = net.head
        assert (hidden.out_features, last.out_features) == (128, 1)
        z = last(hidden(torch.cat(summed, 1)).relu())
        torch.testing.assert_close(net(image), z, rtol=1e-3, atol=1e-4)


def test_the_papers_network_has_57_million_parameters_bn_and_xavier():
    with torch.device("meta"):
        counted = sum(p.numel() for p in create_classifier("alexnet").parameters())
    assert round(counted / 1e6) == 57
    net = create_classifier("alexnet_attn2")
    bound = (6 / (256 * 9 + 256 * 9)) ** 0.5  # Xavier, uniform, of convolution 5
    weight = net.conv5[0].weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert isinstance(net.conv1[1], torch.nn.BatchNorm2d)
    assert spec("alexnet_attn2").size == 299 and create_classifier("alexnet_attn2")(
        torch.zeros(2, 1, 99, 99)
    ).shape == (2, 1)


def test_two_classes_are_the_same_network_and_cross_entropy_is_bce_with_logits(image):
    torch.manual_seed(0)
    one = create_classifier("alexnet_attn2").eval()
    two = create_classifier("alexnet_attn2", num_classes=2).eval()
    two.load_state_dict(one.state_dict())
    with torch.inference_mode():
        z, logits = one(image), two(image)
    torch.testing.assert_close(logits.softmax(1)[:, 1:], z.sigmoid())
    covid = get_task("covid")
    target = torch.tensor(np.stack([covid.target("Normal"), covid.target("COVID-19")]))
    expected = F.binary_cross_entropy_with_logits(z[:, 0], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(class_loss(logits, target, covid), expected)
    assert create_classifier("alexnet_attn3", num_classes=5)(image).shape == (2, 5)


def test_the_mask_is_ignored(image):
    net = create_classifier("alexnet_attn1").eval()
    with torch.inference_mode():
        assert torch.equal(net(image), net(image, torch.rand(2, 1, 99, 99)))
        assert create_classifier("alexnet").eval().local_attention(image) == []
    assert net.attention_maps(torch.ones(1, 1, 99, 99)) == []


@pytest.fixture(scope="module")
def two_classes(phantoms, tmp_path_factory):
    """The phantoms with COVID-19 for the opacity; some of them from other hospitals."""
    root = tmp_path_factory.mktemp("covid")
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    for column in ("image", "mask"):
        index[column] = [str(phantoms / name) for name in index[column]]
    index["label"] = index.label.where(index.label == "Normal", "COVID-19")
    index.loc[index.split == "test", "source"] = ["kermany", "shenzhen"] * 4
    index.loc[index.index[-2:], "split"] = "external"
    index.to_csv(root / "index.csv", index=False)
    return root


def test_the_whole_experiment(two_classes, random_weights, tmp_path, run, capsys):
    """Every network is trained once, answers for each place, and is not trained again; what is recorded outlives it."""
    out, record = tmp_path / "runs", tmp_path / "record"
    small = "--size 80 --batch 4 --epochs 1 --trials 1 --device cpu --one kermany,shenzhen".split()
    networks = ["--networks", "forest", "alexnet_attn2", "alexnet_attn1", "efficientnet_lite0_last"]
    data = ["--data", two_classes, "--weights", random_weights, "--cache", tmp_path / "cache"]
    run(alexnet, *data, "--out", out, *small, *networks, "--record", record)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["compositions"]) == ["one", "several", "outside"]
    assert list(results["compositions"]["outside"]) == ["forest", "alexnet_attn2", "efficientnet_lite0_last"]
    for name, found in results["compositions"]["one"].items():
        assert found["one"]["n"] == 6 and found["external"]["n"] == 2, name
        assert found["one"]["covid"] == 3 and 0 <= found["one"]["auroc"] <= 1
    assert list(results["pairs"]["one"]) == ["alexnet_attn2 - alexnet_attn1"]
    tables = (record / "tables.md").read_text(encoding="utf-8")
    assert "96.8" in tables and "lungs blacked out" in tables

    weights = sorted(out.glob("*/alexnet*/0/best.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    assert len(weights) == 5
    run(alexnet, *data, "--out", out, *small, *networks, "--report")
    assert [path.stat().st_mtime_ns for path in weights] == before
    capsys.readouterr()
    shutil.rmtree(out)
    run(alexnet, *data, "--out", out, *small, "--report", "--record", record)
    assert json.loads((record / "results.json").read_text(encoding="utf-8")) == results


def test_the_forest_grows_by_two_trees_a_batch(two_classes, random_weights, tmp_path, monkeypatch):
    grown = []
    fit = alexnet.RandomForestClassifier.fit
    monkeypatch.setattr(
        alexnet.RandomForestClassifier, "fit", lambda self, x, y: grown.append(self.n_estimators) or fit(self, x, y)
    )
    recipe = replace(RECIPES["classify"]["alexnet"], size=32, batch=4)
    settings = Run(str(two_classes), cache=str(tmp_path), weights=str(random_weights))
    predict = alexnet.forest(recipe, settings)
    assert grown == [5, 7, 9, 11]
    p = predict(alexnet.dataset_of("one", recipe, settings, "kermany,shenzhen"))
    assert p.shape == (6,) and p.min() >= 0 and p.max() <= 1


def test_only_networks_that_were_trained_for_as_long_are_compared():
    rows = pd.DataFrame({"label": ["Normal"] * 4 + ["COVID-19"] * 4, "patient": list("abcdefgh")})
    lengths = {"alexnet": 8, "alexnet_attn1": 60, "alexnet_attn2": 60, "alexnet_attn3": 60}
    runs = [
        {"composition": "one", "network": name, "trial": 0, "epochs": epochs, "places": {"one": [0] * 4 + [1000] * 4}}
        | {"recipe": {"init": "other.safetensors" if name == "alexnet_attn3" else None}}
        for name, epochs in lengths.items()
    ]
    assert list(alexnet.summarise(runs, {"one": rows})["pairs"]["one"]) == ["alexnet_attn2 - alexnet_attn1"]
    runs[0]["epochs"] = 60
    found = list(alexnet.summarise(runs, {"one": rows})["pairs"]["one"])
    assert found == ["alexnet_attn1 - alexnet", "alexnet_attn2 - alexnet", "alexnet_attn2 - alexnet_attn1"]


def test_a_difference_is_paired_by_seed_and_resamples_trials():
    rows = pd.DataFrame({"label": ["Normal"] * 4 + ["COVID-19"] * 4, "patient": list("abcdefgh")})
    right, wrong = [0] * 4 + [1000] * 4, [1000] * 4 + [0] * 4

    def runs(*trials: tuple[int, list[int]]) -> list[dict]:
        return [{"trial": trial, "places": {"one": answers}} for trial, answers in trials]

    best, mixed = runs((0, right), (1, right)), runs((0, right), (1, wrong))
    assert alexnet.difference(best, runs((0, right), (2, wrong)), rows)["value"] == 0, "the seed of both"
    assert alexnet.difference(best, runs((2, wrong)), rows) is None
    found = alexnet.difference(best, mixed, rows)
    assert found["value"] == 0.5 and found["trials"] == 2
    assert found["low"] < 0 < found["high"], "every patient says the same, two seeds do not"


def test_figures_of_answers_that_are_known():
    rows = pd.DataFrame({"label": ["Normal"] * 4 + ["COVID-19"] * 4, "patient": list("abcdefgh")})
    always, never = np.array([0] * 4 + [1000] * 4), np.array([0] * 8)
    found = alexnet.figures([always, never], rows)
    assert found["accuracy"]["value"] == 0.75 and found["sensitivity"]["value"] == 0.5
    assert found["specificity"]["value"] == 1 and found["auroc"] == 0.75


def test_it_is_shown_the_whole_xray_unless_asked_otherwise(tmp_path):
    whole = {"size": 99, "sees": "whole"}
    pipe = Pipeline.load(make_weights(tmp_path, {"alexnet_attn1": "covid"}, alexnet_attn1=whole))
    x = phantom(128)
    mine, none = (Lungs(mask.astype(np.float32), mask) for mask in (np.ones((64, 64), bool), np.zeros((64, 64), bool)))
    said = [
        pipe.analyze(x, lungs=lungs, sees=sees).readings["alexnet_attn1"].probabilities["COVID-19"]
        for lungs, sees in ((mine, None), (none, None), (none, "whole"), (none, "lungs"))
    ]
    assert said[0] == said[1] == said[2] != said[3]
