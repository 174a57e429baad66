"""The last layer that is fitted again: sources of a class weigh the same, margins hold, no class is given up."""

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
from manet_core.tasks import MANET
from manet_core.weights import load_network, read_manifest, sha256, write_manifest
from train import refit
from train.data import LungPictures, Pictures
from train.measures.statistics import row_weights


@pytest.fixture
def blobs(rng):
    """Three classes of three sources, of unequal size: features (N, 6), labels, sources."""
    sizes = {"0 a": 40, "0 b": 10, "1 a": 25, "2 c": 15}
    groups = np.repeat(list(sizes), list(sizes.values()))
    labels = np.array([int(group[0]) for group in groups])
    features = rng.normal(size=(len(groups), 6)) * [1, 5, 1, 2, 1, 1] + labels[:, None] * [1, 0, 2, 0, 0, 1]
    return features, labels, np.array([group[2] for group in groups])


@pytest.mark.parametrize(("class_weights", "of_class"), [("natural", [50, 25, 15]), ("equal", [30, 30, 30])])
def test_sources_weigh_alike_within_a_class_and_classes_as_chosen(blobs, class_weights, of_class):
    _, labels, sources = blobs
    weights = pd.DataFrame({"w": row_weights(labels, sources, class_weights), "label": labels, "source": sources})
    assert weights.w.mean() == pytest.approx(1)
    np.testing.assert_allclose(weights.groupby("label").w.sum(), of_class)
    groups = weights.groupby(["label", "source"]).w.sum()
    assert groups[0, "a"] == pytest.approx(groups[0, "b"]), "the larger source of a class counts no more"


def test_refit_is_a_logistic_regression_of_standardised_features(blobs):
    features, labels, sources = blobs
    weight, bias = refit.refit(*blobs, strength=0.1)
    scale = StandardScaler().fit(features)
    each = np.where(labels > 0, 1, np.where(sources == "a", 50 / 2 / 40, 50 / 2 / 10))
    by_hand = LogisticRegression(C=0.1, max_iter=1000).fit(scale.transform(features), labels, sample_weight=each)
    found = features @ weight.T + bias
    np.testing.assert_allclose(found, by_hand.decision_function(scale.transform(features)), atol=1e-6)


@pytest.mark.parametrize(("class_weights", "share"), [("natural", [10, 4, 1]), ("equal", [5, 5, 5])])
def test_features_that_tell_nothing_get_the_chosen_class_weights(rng, class_weights, share):
    features = rng.normal(size=(300, 4))
    labels = np.repeat([0, 1, 2], [200, 80, 20])
    weight, bias = refit.refit(features, labels, np.full(300, "a"), strength=1e-4, class_weights=class_weights)
    p = np.exp(features @ weight.T + bias)
    np.testing.assert_allclose((p / p.sum(1, keepdims=True)).mean(0), np.array(share) / 15, atol=0.03)


def logits_of(predicted, least=4.0):
    """Logits (N, 3) that lead by `least` to `least` + 2 where they give each of 100 X-rays its class."""
    return np.tile(np.linspace(least, least + 2, 101)[:100], 3)[:, None] * np.eye(3)[predicted]


def test_choose_looks_at_each_class():
    labels = np.repeat([0, 1, 2], 100)
    trained = logits_of(labels)
    kept, margins, found = refit.choose(trained, logits_of(labels, 6), labels, 0.95, cost=5)
    assert kept == "refitted" and all((values == 1).all() for values in found.values())
    np.testing.assert_allclose(margins, 6.099)  # 95 % of the hundred lead by more
    worse = labels.copy()
    worse[9:100:10] = 1  # a tenth of class 0 is lost: it has nothing to spare, and the margins of the others feed it
    kept, margins, found = refit.choose(trained, logits_of(worse), labels, 0.95, cost=5)
    assert kept == "trained" and found["refitted"].tolist() == pytest.approx([0.9, 0.95, 0.95])
    np.testing.assert_allclose(margins, 4.099)
    assert refit.choose(trained, logits_of(worse), labels, 0.95, cost=10)[0] == "refitted"


def test_a_small_class_is_not_given_up_for_a_large_one():
    """The new layer is right more often in all, but loses half of a class of ten: it is not kept."""
    labels = np.repeat([0, 1], [200, 10])
    old, new = np.zeros((210, 2)), np.zeros((210, 2))
    old[np.arange(210), np.where(np.arange(210) < 40, 1, labels)] = 1
    new[np.arange(210), np.where(np.arange(210) >= 205, 0, labels)] = 1
    kept, margins, found = refit.choose(old, new, labels, 0.95, cost=5)
    assert kept is None and not margins.any()
    assert found["as trained"].tolist() == [0.8, 1] and found["refitted"].tolist() == [1, 0.5]


def test_choose_leaves_a_network_alone_that_has_nothing_to_spare():
    labels = np.repeat([0, 1, 2], 100)
    predicted = labels.copy()
    predicted[::10] = (predicted[::10] + 1) % 3
    kept, margins, _ = refit.choose(logits_of(predicted), logits_of(np.zeros(300, int)), labels, 0.95, cost=5)
    assert kept is None and not margins.any()


@pytest.fixture
def five(phantoms, tmp_path):
    """The phantoms, labelled with all five classes in turn."""
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index["image"], index["mask"] = (str(phantoms) + "/" + index[column] for column in ("image", "mask"))
    index["label"] = [CLASSES[i % 5] for i in range(len(index))]
    index.to_csv(tmp_path / "index.csv", index=False)
    return tmp_path


def test_the_verb_adds_a_layer_and_changes_nothing_else(five, random_weights, run, tmp_path):
    weights = shutil.copytree(random_weights, tmp_path / "weights")
    common = ["--data", five, "--weights", weights, "--cache", tmp_path / "cache", "--models", "efficientnet_lite0_ma"]
    run(refit, *common, "--cost", 100)  # random features tell nothing: take the layer whatever it costs
    entries, before = read_manifest(weights), read_manifest(random_weights)
    entry = entries.pop("efficientnet_lite0_ma")
    layer, temperature = entry.pop("last_layer"), entry.pop("temperature")
    assert 0.2 <= entry.pop("operating_point") <= 1, "that of the new layer; the highest of five classes has a fifth"
    assert before["efficientnet_lite0_ma"].pop("temperature") != temperature
    assert entry == before.pop("efficientnet_lite0_ma") and entries == before, "all else is as it was"
    assert layer["kind"] == "refitted" and layer["margins"].keys() == set(CLASSES) and temperature > 0
    assert layer["class_weights"] == "natural" and layer["validation_sensitivity"]["refitted"].keys() <= set(CLASSES)
    assert sha256(weights / entry["file"]) == entry["sha256"]

    pictures = Pictures(five, 64, tmp_path / "cache")
    rows = pictures.rows("test", task=MANET)
    dataset = LungPictures("classify", pictures, rows, pictures.masks)
    trained = load_network(weights, "efficientnet_lite0_ma", refitted=False)
    _, seen = refit.read_out(trained, dataset, "as trained")
    logits, again = refit.read_out(load_network(weights, "efficientnet_lite0_ma"), dataset, "refitted")
    np.testing.assert_array_equal(seen, again)
    tensors = load_file(weights / layer["file"])
    assert tensors.keys() == {"classifier.weight", "classifier.bias"}
    np.testing.assert_allclose(logits, seen @ tensors["classifier.weight"].T + tensors["classifier.bias"], atol=1e-5)

    run(refit, *common, "--cost", 100)
    assert read_manifest(weights)["efficientnet_lite0_ma"]["last_layer"] == layer, "it starts from the trained layer"
    assert Pipeline.load(weights).hashes["efficientnet_lite0_ma"] == f"{entry['sha256']}+{layer['sha256']}"
    run(refit, *common, "--cost", -101)
    assert "last_layer" not in read_manifest(weights)["efficientnet_lite0_ma"]
    assert not (weights / layer["file"]).exists()


def test_a_set_of_weights_beside_another_keeps_its_own_layers(five, random_weights, run, tmp_path):
    weights, name = shutil.copytree(random_weights, tmp_path / "weights"), "efficientnet_lite0_ma"
    entries = read_manifest(weights)
    entries[name]["file"] = f"second.{name}.safetensors"
    shutil.copy(weights / f"{name}.safetensors", weights / f"second.{name}.safetensors")
    write_manifest(weights / "second.json", entries)
    before = {path.name: path.read_bytes() for path in weights.iterdir() if path.name != "second.json"}
    run(
        refit,
        "--data",
        five,
        "--weights",
        weights / "second.json",
        "--cache",
        tmp_path,
        "--models",
        name,
        "--cost",
        100,
    )
    layer = read_manifest(weights / "second.json")[name]["last_layer"]
    assert layer["file"] == f"second.{name}.last_layer.safetensors" and (weights / layer["file"]).exists()
    assert all((weights / file).read_bytes() == content for file, content in before.items())


def test_a_damaged_or_missing_layer_is_named(five, random_weights, run, tmp_path):
    weights = shutil.copytree(random_weights, tmp_path / "weights")
    common = ["--data", five, "--weights", weights, "--cache", tmp_path, "--models", "efficientnet_lite0"]
    run(refit, *common, "--cost", 100)
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
    with pytest.raises(SystemExit, match="for resnet99; there are: efficientnet_lite0"):
        run(refit, *common, "--models", "resnet99")
    assert (random_weights / "manifest.json").read_bytes() == manifest and json.loads(manifest)
