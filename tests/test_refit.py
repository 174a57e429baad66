"""The last layer that is fitted again: each group weighs the same, margins hold, nothing is lost."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import flip_a_bit
from safetensors.numpy import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from manet_core import CLASSES, Pipeline, WeightsError
from manet_core.weights import load_network, read_manifest, sha256
from train import refit
from train.data import LungPictures, Pictures


@pytest.fixture
def blobs(rng):
    """Three classes in four groups of unequal size: features (N, 6), labels, groups."""
    sizes = {"0 of a": 40, "0 of b": 10, "1 of a": 25, "2 of c": 15}
    groups = np.repeat(list(sizes), list(sizes.values()))
    labels = np.array([int(group[0]) for group in groups])
    features = rng.normal(size=(len(groups), 6)) * [1, 5, 1, 2, 1, 1] + labels[:, None] * [1, 0, 2, 0, 0, 1]
    return features, labels, pd.Series(groups)


def test_refit_is_a_logistic_regression_of_standardised_features(blobs):
    features, labels, groups = blobs
    weight, bias = refit.refit(*blobs, strength=0.1)
    scale = StandardScaler().fit(features)
    each = (len(groups) / groups.nunique() / groups.value_counts())[groups].to_numpy()
    by_hand = LogisticRegression(C=0.1, max_iter=1000).fit(scale.transform(features), labels, sample_weight=each)
    found = features @ weight.T + bias
    np.testing.assert_allclose(found, by_hand.decision_function(scale.transform(features)), atol=1e-6)


def test_every_group_weighs_the_same_whatever_its_size(rng):
    """Of two classes that lie in the same place, the larger group does not win."""
    features = rng.normal(size=(300, 4))
    labels = np.repeat([0, 1, 2], [200, 80, 20])
    weight, bias = refit.refit(features, labels, pd.Series(labels.astype(str)), strength=1e-4)
    p = np.exp(features @ weight.T + bias)
    np.testing.assert_allclose((p / p.sum(1, keepdims=True)).mean(0), 1 / 3, atol=0.03)


def logits_of(called, least=4.0):
    """Logits (N, 3) that lead by `least` to `least` + 2 where they call each of 100 X-rays a class."""
    return np.tile(np.linspace(least, least + 2, 101)[:100], 3)[:, None] * np.eye(3)[called]


def test_choose_takes_what_costs_at_most_a_point():
    labels = np.repeat([0, 1, 2], 100)
    trained = logits_of(labels)
    kept, margins, accuracy = refit.choose(trained, logits_of(labels, 6), labels, 0.95)
    assert kept == "refitted" and accuracy == {"as trained": 1, "refitted": 1, "trained": 1}
    np.testing.assert_allclose(margins, 6.099)  # 95 % of the hundred lead by more
    worse = labels.copy()
    worse[9:100:10] = 1  # a tenth of class 0 is lost: it has nothing to spare, and the margins of the others feed it
    kept, margins, accuracy = refit.choose(trained, logits_of(worse), labels, 0.95)
    assert kept == "trained" and accuracy["refitted"] == pytest.approx((90 + 95 + 95) / 300)
    np.testing.assert_allclose(margins, 4.099)


def test_choose_leaves_a_network_alone_that_has_nothing_to_spare():
    labels = np.repeat([0, 1, 2], 100)
    called = labels.copy()
    called[::10] = (called[::10] + 1) % 3
    kept, margins, _ = refit.choose(logits_of(called), logits_of(np.zeros(300, int)), labels, 0.95)
    assert kept is None and not margins.any()


@pytest.fixture
def five(phantoms, tmp_path):
    """The phantoms, called by all five classes in turn."""
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index["image"], index["mask"] = (str(phantoms) + "/" + index[column] for column in ("image", "mask"))
    index["label"] = [CLASSES[i % 5] for i in range(len(index))]
    index.to_csv(tmp_path / "index.csv", index=False)
    return tmp_path


def test_the_verb_adds_a_layer_and_changes_nothing_else(five, random_weights, run, tmp_path, monkeypatch):
    weights = shutil.copytree(random_weights, tmp_path / "weights")
    common = ["--data", five, "--weights", weights, "--cache", tmp_path / "cache", "--models", "efficientnet_lite0_ma"]
    monkeypatch.setattr(refit, "COST", 1.0)  # random features carry nothing: take the layer whatever it costs
    run(refit, *common)
    entries, before = read_manifest(weights), read_manifest(random_weights)
    entry = entries.pop("efficientnet_lite0_ma")
    layer, temperature = entry.pop("last_layer"), entry.pop("temperature")
    assert entry == before.pop("efficientnet_lite0_ma") and entries == before, "all else is as it was"
    assert layer["kind"] == "refitted" and layer["margins"].keys() == set(CLASSES) and temperature > 0
    assert sha256(weights / entry["file"]) == entry["sha256"]

    pictures = Pictures(five, 64, tmp_path / "cache")
    rows = pictures.rows("test", labelled=True)
    dataset = LungPictures("classify", pictures, rows, pictures.masks)
    trained = load_network(weights, "efficientnet_lite0_ma", refitted=False)
    _, seen = refit.read_out(trained, dataset, "as trained")
    logits, again = refit.read_out(load_network(weights, "efficientnet_lite0_ma"), dataset, "refitted")
    np.testing.assert_array_equal(seen, again)
    tensors = load_file(weights / layer["file"])
    assert tensors.keys() == {"classifier.weight", "classifier.bias"}
    np.testing.assert_allclose(logits, seen @ tensors["classifier.weight"].T + tensors["classifier.bias"], atol=1e-5)

    run(refit, *common)
    assert read_manifest(weights)["efficientnet_lite0_ma"]["last_layer"] == layer, "it starts from the trained layer"
    assert Pipeline.load(weights).hashes["efficientnet_lite0_ma"] == f"{entry['sha256']}+{layer['sha256']}"
    monkeypatch.setattr(refit, "COST", -1.0)
    run(refit, *common)
    assert "last_layer" not in read_manifest(weights)["efficientnet_lite0_ma"]
    assert not (weights / layer["file"]).exists()


def test_a_damaged_or_missing_layer_is_named(five, random_weights, run, tmp_path, monkeypatch):
    weights = shutil.copytree(random_weights, tmp_path / "weights")
    monkeypatch.setattr(refit, "COST", 1.0)
    run(refit, "--data", five, "--weights", weights, "--cache", tmp_path, "--models", "efficientnet_lite0")
    path = weights / "efficientnet_lite0.last_layer.safetensors"
    flip_a_bit(path)
    with pytest.raises(WeightsError, match="last_layer.safetensors is damaged"):
        Pipeline.load(weights)
    path.unlink()
    with pytest.raises(WeightsError, match="last_layer.safetensors is missing"):
        Pipeline.load(weights)


def test_what_cannot_be_refitted_is_said_in_a_sentence(phantoms, random_weights, run, tmp_path):
    common = ["--data", phantoms, "--weights", random_weights, "--cache", tmp_path]
    manifest = (random_weights / "manifest.json").read_bytes()
    with pytest.raises(SystemExit, match="no training X-ray of COVID-19, Tuberculosis, Viral pneumonia"):
        run(refit, *common)
    with pytest.raises(SystemExit, match="no weights of resnet99; there are: efficientnet_lite0"):
        run(refit, *common, "--models", "resnet99")
    assert (random_weights / "manifest.json").read_bytes() == manifest and json.loads(manifest)
