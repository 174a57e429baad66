"""The measures behind the evidence, each against arithmetic that was done another way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_weights
from scipy.special import logsumexp, softmax
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, roc_auc_score

from manet_core import CLASSES, Pipeline, create_classifier, load_xray
from manet_core.explain import get_explainer
from manet_core.explain.gradcam import scale_maps
from manet_core.phantom import phantom
from manet_core.preprocess import SEES, network_input
from manet_core.tasks import GUIDED, MANET, NIH14, get_task
from manet_core.weights import read_manifest, write_manifest
from train import classify, evaluate, evidence, export, familiarity
from train import pose as teach_pose
from train.measures import (
    agreement,
    classification,
    controls,
    ensemble,
    explainers,
    external,
    findings,
    groups,
    heatmaps,
    localisation,
    ood,
    other_findings,
    robustness,
    segmentation,
    source_probe,
    statistics,
)
from train.measures.calibration import (
    brier,
    calibration,
    error_by_chance,
    expected_calibration_error,
    fit_temperature,
    multi_label_error,
    operating_point,
    reliability,
    spare_margins,
)
from train.measures.duplicates import crossing_patients, near_duplicates
from train.measures.markdown import percent, write_between
from train.measures.study import NotMeasured, Readings, Study, documents, results_folder
from train.recipe import Recipe

# --- what a network sees --------------------------------------------------------------------------------------------


@pytest.fixture
def xray(rng):
    mask = np.zeros((32, 32), bool)
    mask[8:24, 4:28] = True
    return rng.random((32, 32)).astype(np.float32), mask


@pytest.mark.parametrize("sees", SEES)
def test_inputs_span_minus_one_to_one(xray, sees):
    out = network_input(*xray, sees, np.random.default_rng(0))
    assert out.dtype == np.float32 and out.min() == -1 and out.max() == pytest.approx(1, abs=1e-5)


def test_controls_show_what_they_say(xray):
    image, mask = xray
    view = {sees: network_input(image, mask, sees, np.random.default_rng(0)) for sees in SEES}
    assert (view["lungs"][~mask] == -1).all() and (view["outside"][mask] == -1).all()
    np.testing.assert_allclose(view["outside"][~mask], 2 * image[~mask] / image[~mask].max() - 1, atol=1e-5)
    assert ((view["shape"] == 1) == mask).all()
    np.testing.assert_allclose(np.sort(view["shuffled"][mask]), np.sort(view["lungs"][mask]), atol=1e-6)
    assert np.corrcoef(view["shuffled"][mask], view["lungs"][mask])[0, 1] < 0.3
    levels = (view["equalised"][mask] + 1) / 2
    np.testing.assert_allclose(np.sort(levels), np.arange(1, mask.sum() + 1) / mask.sum(), atol=1e-6)
    other_film = network_input(image**3, mask, "equalised", np.random.default_rng(0))
    np.testing.assert_allclose(other_film, view["equalised"], atol=1e-6)
    low, high = image.min(), image.max()
    np.testing.assert_allclose(view["whole"], 2 * (image - low) / (high - low) - 1, atol=1e-5)
    with pytest.raises(ValueError, match="shuffled"):
        network_input(image, mask, "nothing", np.random.default_rng(0))


# --- calibration ----------------------------------------------------------------------------------------------------


def test_temperature_undoes_overconfidence(rng):
    honest = rng.normal(size=(4000, 5)) * 1.5
    labels = np.array([rng.choice(5, p=p) for p in softmax(honest, 1)])
    assert fit_temperature(honest * 3, labels) == pytest.approx(3, rel=0.1)
    twice, weights = np.concatenate([honest * 3, honest]), np.repeat([0.0, 1.0], 4000)
    assert fit_temperature(twice, np.tile(labels, 2), weights=weights) == pytest.approx(1, rel=0.1)
    out = calibration(honest * 3, labels, 3.0)
    assert out["after"]["ece"] < 0.03 < out["before"]["ece"]
    assert out["after"]["brier"] < out["before"]["brier"]


def test_error_by_chance_is_what_honest_labels_show(rng):
    p = np.full((400, 2), 0.5) + np.array([0.3, -0.3])
    expected = error_by_chance(p)
    drawn = [expected_calibration_error(p, (rng.random(400) > 0.8).astype(int)) for _ in range(300)]
    assert expected["mean"] == pytest.approx(np.mean(drawn), rel=0.1)
    assert expected["mean"] == pytest.approx(np.sqrt(0.8 * 0.2 / 400 * 2 / np.pi), rel=0.1)  # mean of a folded normal
    assert expected["high"] == pytest.approx(np.percentile(drawn, 97.5), rel=0.15)


def test_the_operating_point_is_the_lowest_with_enough_right_answers(rng):
    confidence, right = np.array([0.9, 0.8, 0.8, 0.7, 0.6, 0.5]), np.array([1, 1, 0, 1, 1, 0], bool)
    assert operating_point(confidence, right, 0.8) == 0.6, "4 of 5, though from 0.7 on there are but 3 of 4"
    assert operating_point(confidence, right, 0.75) == 0.6 and operating_point(confidence, right, 0.6) == 0.5
    assert operating_point(confidence, right, 0.95) == 0.9
    assert operating_point(confidence, np.zeros(6, bool), 0.5) == 1.0
    assert operating_point(np.full(4, 0.8), np.array([1, 1, 1, 0], bool), 0.8) == 1.0, "equals stand or fall together"
    for _ in range(50):
        confidence, right = rng.random(60).round(1), rng.random(60) < 0.6
        slow = [t for t in np.unique(confidence) if right[confidence >= t].mean() >= 0.7]
        assert operating_point(confidence, right, 0.7) == (min(slow) if slow else 1.0)


def test_spare_margins_are_what_95_percent_of_a_class_have():
    labels = np.repeat([0, 1], 101)
    logits = np.zeros((202, 3))
    logits[:101, 0] = np.linspace(1, 11, 101)  # class 0 leads by 1 to 11, so 95 % of it by 1.5 or more
    logits[101:, 1] = np.linspace(-5, 5, 101)  # a twentieth of class 1 lies behind: nothing to spare
    margins = spare_margins(logits, labels)
    np.testing.assert_allclose(margins, [1.5, 0, 0])
    held = (logits - margins).argmax(1)
    assert (held[:101] == 0).mean() == pytest.approx(0.95, abs=0.011)


def test_calibration_errors_by_hand(rng):
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    labels = np.array([0, 1, 1, 0])
    assert expected_calibration_error(p, labels, bins=2) == pytest.approx(abs(0.75 - 0.75))
    assert expected_calibration_error(p, labels, bins=10) == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4)
    assert sum(row["n"] for row in reliability(p, labels)) == 4
    assert brier(p, labels) == pytest.approx(2 * brier_score_loss(labels, p[:, 1]))


# --- heatmaps -------------------------------------------------------------------------------------------------------


class Corner(torch.nn.Module):
    """Class 1 is the brightness of the upper left quarter; features are the picture itself."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, image, mask=None):
        corner = 10 * image[:, 0, :8, :8].mean((1, 2)) * self.weight
        return torch.stack([torch.zeros_like(corner), corner], 1)


def test_erasure_rewards_the_heatmap_that_points_at_what_is_used():
    image = torch.zeros(1, 16, 16)
    image[0, :8, :8] = 1
    mask = torch.ones(1, 16, 16)
    true, false = np.zeros((16, 16)), np.zeros((16, 16))
    true[:8, :8], false[8:, 8:] = 1, 1
    right, wrong = (heatmaps.erasure(Corner(), image, mask, 1, heat) for heat in (true, false))
    assert right[0] < wrong[0] and right[1] > wrong[1]


def test_measures_of_a_heatmap_by_hand():
    heat, mask = np.zeros((4, 4)), np.zeros((4, 4))
    heat[0], mask[:, :2] = 1, 1
    assert heatmaps.in_lung(heat, mask) == pytest.approx(0.5)
    assert heatmaps.spread(heat) == pytest.approx(np.log(4) / np.log(16))
    assert heatmaps.spread(np.ones((4, 4))) == pytest.approx(1)
    assert heatmaps.correlation(heat, heat) == pytest.approx(1)
    assert np.isnan(heatmaps.correlation(heat, np.ones((4, 4))))
    assert heatmaps.in_lung(np.zeros((4, 4)), mask) == 0


# --- familiarity ----------------------------------------------------------------------------------------------------


def test_distance_is_mahalanobis_and_the_limit_holds_its_share(rng):
    train = rng.normal(size=(3000, 4)) * [1, 2, 3, 4] + 5
    known = familiarity.learn(train, train[:1000], share=0.9)
    gap = np.array([1, 2, 3, 4.0])
    assert known.distance(gap + train.mean(0)) == pytest.approx(1, rel=0.1)  # one deviation in each direction
    distances = np.array([known.distance(row) for row in train[:1000]])
    assert (distances <= known.limit).mean() == pytest.approx(0.9, abs=0.002)
    assert known.warnings(known.limit) == []
    (sentence,) = known.warnings(2 * known.limit)
    assert f"distance {2 * known.limit:.1f}" in sentence and "90%" in sentence and sentence.endswith("less.")


def test_detection_by_hand():
    out = ood.detection(np.array([1, 2, 3, 4]), np.array([3.5, 5, 6, 7]), limit=3.2)
    assert out["auroc"] == pytest.approx(15 / 16) and out["detected"] == 1
    assert ood.detection(np.array([1, 2]), np.array([3, 4]), 3.5)["detected"] == 0.5
    assert out["false_alarms_at_95"] == 0.25  # 95 % of the others lie above 3.725


def test_packaged_pictures_and_spoilt_xrays_are_what_they_say(rng):
    others = ood.packaged_pictures(64)
    assert len(others) % 4 == 0 and len(others) > 100
    assert all(x.shape == (64, 64) and x.dtype == np.float32 for x in others)
    x = phantom(64, 0).pixels
    spoilt = {name: kind[0] for name, kind in ood.spoilt([x]).items()}
    np.testing.assert_array_equal(spoilt["X-rays upside down"], x[::-1, ::-1])
    np.testing.assert_allclose(spoilt["X-rays inverted"] + x, 1)
    assert all(y.shape == x.shape and 0 <= y.min() and y.max() <= 1 for y in spoilt.values())


# --- disturbances, duplicates, groups -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", robustness.CHANGES)
def test_disturbances_keep_size_and_range(name):
    x = phantom(96, 0).pixels
    changed = robustness.CHANGES[name](x)
    assert changed.shape == x.shape and changed.min() >= 0 and changed.max() <= 1 + 1e-6
    assert np.array_equal(changed, x) == (name == "none")
    assert 0 < np.abs(changed - x).mean() < 0.3 or name == "none"


def test_near_duplicates_across_splits_are_found():
    pictures = [phantom(96, seed).pixels for seed in range(6)]
    pictures.append(robustness.jpeg(robustness.contrast(pictures[0], 0.9), 50))  # the same film, another file
    pictures.append(pictures[1])  # the same film, in the same split
    index = pd.DataFrame({"split": ["train"] * 6 + ["test", "train"], "patient": [*"abcdef", "a", "b"]})
    pairs = near_duplicates(np.stack(pictures), index, bits=6, closeness=0.99)
    assert (pairs.a.tolist(), pairs.b.tolist()) == ([0], [6])
    assert crossing_patients(index) == ["a"]


def test_real_splits_share_no_patient(index):
    assert crossing_patients(index) == []


def readings(predicted: list[int], task=MANET, **columns) -> Readings:
    """What a network says that is sure of `predicted`, of rows with these columns of an index."""
    index = pd.DataFrame({"source": "nih", "split": "test", "findings": ""} | columns)
    if "patient" not in index:
        index["patient"] = [f"p{i}" for i in range(len(index))]
    logits = 4 * np.eye(len(task.classes), dtype=np.float32)[predicted]
    return Readings(task, index, logits, np.zeros((len(index), 2), np.float32))


LABELS = ["Normal", "Normal", "Pneumonia (unspecified)", "Viral pneumonia", "Tuberculosis", "Other finding"]


def test_external_groups_count_the_right_answers():
    out = external.external(readings([0, 2, 4, 3, 0, 0], label=LABELS, split="external"))
    assert out["adult normals"]["all"]["n"] == 2 and out["adult normals"]["nih"]["sensitivity"]["value"] == 0.5
    assert out["adult pneumonia"]["all"]["sensitivity"]["value"] == 1
    assert out["tuberculosis"]["all"]["sensitivity"]["value"] == 0
    assert out["adult normals"]["all"]["predicted"]["Tuberculosis"] == 1
    assert "COVID-19" not in out, "there is none"
    three = external.external(readings([0, 2, 1, 0, 0, 0], GUIDED, label=LABELS, split="external"))
    assert three["adult pneumonia"]["all"]["sensitivity"]["value"] == 0.5 and "tuberculosis" not in three


def test_sensitivity_by_class_and_source_knows_partial_labels():
    source = ["nih", "rsna_normal", "nih", "kermany", "shenzhen", "nih"]
    r = readings([0, 1, 3, 3, 2, 0], label=LABELS, source=source)
    found, means = groups.by_group(r, r.known("test"))
    by_group = {(g["label"], g["source"]): g["sensitivity"]["value"] for g in found["groups"]}
    assert by_group == {
        ("Normal", "nih"): 1, ("Normal", "rsna_normal"): 0, ("Pneumonia (unspecified)", "nih"): 1,
        ("Viral pneumonia", "kermany"): 0, ("Tuberculosis", "shenzhen"): 1,
    }  # fmt: skip
    assert found["n"] == 5 and found["mean"]["value"] == pytest.approx(3 / 5) and means.shape == (2000, 2)
    assert found["classes"].keys() == {"Normal", "Tuberculosis", "Viral pneumonia"}, "a partial label names no class"
    assert found["class_mean"]["value"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    cohorts = groups.cohorts(r, r.known("test"))
    assert cohorts["adult normals, NIH"]["read_as"]["value"] == 0.5
    assert cohorts["adult normals, NIH"]["specificity"]["value"] == 0.5, "one of two is told COVID-19"
    assert cohorts["adult pneumonia, NIH"]["read_as"]["value"] == 1
    assert cohorts["children with pneumonia"]["read_as"]["value"] == 1, "any pneumonia is right"


def test_the_mean_over_groups_resamples_patients(rng):
    """Two groups of n patients, read right with p and q: the mean's variance is (p(1−p) + q(1−q)) / 4n."""
    n = 300
    right = np.r_[rng.random(n) < 0.9, rng.random(n) < 0.5]
    r = readings(np.where(right, 0, 1), label="Normal", source=["nih"] * n + ["rsna_normal"] * n)
    figure = groups.by_group(r, r.known("test"))[0]["mean"]
    p, q = right[:n].mean(), right[n:].mean()
    assert figure["value"] == pytest.approx((p + q) / 2)
    spread = 2 * 1.96 * np.sqrt((p * (1 - p) + q * (1 - q)) / (4 * n))
    assert figure["high"] - figure["low"] == pytest.approx(spread, rel=0.1)


def test_a_group_of_few_patients_does_not_count_in_the_mean_over_groups():
    label, source = ["Normal"] * 32, ["nih"] * 10 + ["rsna_normal"] * 20 + ["figure1"] * 2
    r = readings([0] * 10 + [0, 1] * 10 + [1, 1], label=label, source=source)
    found, means = groups.by_group(r, r.known("test"))
    assert len(found["groups"]) == 3 and found["mean"]["value"] == pytest.approx((1 + 0.5) / 2)
    assert np.nanmin(means[:, 0]) > 0.5, "the two that are read wrong do not count in a draw either"


def test_macro_f1_is_over_classes_that_somebody_has():
    confusion = np.array([[8.0, 2, 0], [0, 5, 5], [0, 0, 0]])
    truth, predicted = [0] * 10 + [1] * 10, [0] * 8 + [1] * 7 + [2] * 5
    expected = f1_score(truth, predicted, average="macro", labels=[0, 1])
    assert statistics.macro_f1(confusion) == pytest.approx(expected)
    without = confusion * np.array([[1], [0], [1]])
    np.testing.assert_allclose(statistics.macro_f1(np.stack([confusion, without])), [expected, np.nan], rtol=1e-6)


def test_a_pretraining_is_a_training_and_a_test_is_not():
    index = pd.DataFrame({"patient": ["a", "a", "b", "b"], "split": ["train", "pretrain", "pretrain", "test"]})
    assert crossing_patients(index) == ["b"]


def test_every_source_of_a_label_weighs_the_same_in_the_temperature(rng):
    """900 X-rays of a hospital on which the network is honest, 100 of one on which its logits are four times too large:
    the temperature is that of 900 of each.
    """
    task = get_task("covid")
    honest = rng.normal(size=(1000, 2)) * 1.5
    labels = np.array([rng.choice(2, p=p) for p in softmax(honest, 1)])
    large = np.where(np.arange(1000) < 900, 1, 4)
    index = pd.DataFrame(
        {"label": np.array(task.classes)[labels], "source": np.where(large == 1, "large", "small"), "split": "val"}
    )
    logits = (honest * large[:, None]).astype(np.float32)
    repeated = np.concatenate([np.flatnonzero(large == 1), np.repeat(np.flatnonzero(large == 4), 9)])
    found = Readings(task, index, logits, np.zeros((1000, 2), np.float32)).temperature
    assert found == pytest.approx(fit_temperature(logits[repeated], labels[repeated]), rel=0.05)
    assert found > 1.2 * fit_temperature(logits, labels)


def test_temperature_of_partial_labels_and_of_findings(rng):
    honest = rng.normal(size=(4000, 5)) * 1.5
    labels = np.array([rng.choice(5, p=p) for p in softmax(honest, 1)])
    target = np.eye(5)[labels]
    target[(labels >= 3) & (rng.random(4000) < 0.7), 3:] = 1  # most pneumonia is of an unknown kind
    assert fit_temperature(honest * 3, target) == pytest.approx(3, rel=0.1)
    p = softmax(honest * 3 / 2, 1)
    by_hand = -np.log((p * target).sum(1)).mean()
    allowed = np.where(target > 0, honest * 1.5, -np.inf)
    assert by_hand == pytest.approx((logsumexp(honest * 1.5, 1) - logsumexp(allowed, 1)).mean())
    yes = (rng.random((4000, 5)) < 1 / (1 + np.exp(-honest))).astype(float)
    yes[::3] = np.nan
    assert fit_temperature(honest * 2, yes, exclusive=False) == pytest.approx(2, rel=0.1)
    assert (
        multi_label_error(1 / (1 + np.exp(-honest)), yes) < 0.03 < multi_label_error(1 / (1 + np.exp(-3 * honest)), yes)
    )


def test_intervals_of_all_and_none_are_not_empty(rng):
    """Three of three right proves little; 1 − 0.025^(1/n) by hand. Many X-rays of one patient count as one."""
    none = statistics.proportion(np.zeros(6, bool), np.repeat(["a", "b", "c"], 2))
    assert (none["value"], none["low"]) == (0, 0) and none["high"] == pytest.approx(1 - 0.025 ** (1 / 3))
    every = statistics.proportion(np.ones(3, bool), np.arange(3))
    assert (every["value"], every["high"]) == (1, 1) and every["low"] == pytest.approx(0.025 ** (1 / 3))
    right = rng.random(400) < 0.7
    some = statistics.proportion(right, np.arange(400))
    assert some["value"] == right.mean() and some["high"] - some["low"] == pytest.approx(2 * 1.96 * 0.0229, rel=0.1)


def test_auroc_is_scikit_learns_and_draws_patients(rng):
    positive = rng.random(500) < 0.3
    scores = np.round(positive + rng.normal(size=500), 1)  # with ties
    patients = np.arange(500) // 2
    found = statistics.auroc(scores, positive, patients, 200)
    assert found["value"] == pytest.approx(roc_auc_score(positive, scores))
    weights = statistics.bootstrap_weights(patients, 200)
    drawn = [roc_auc_score(positive, scores, sample_weight=w) for w in weights]
    assert found["low"] == pytest.approx(np.percentile(drawn, 2.5))
    assert (found["n"], found["of"]) == (positive.sum(), 500)


def test_an_even_sample_is_even_over_classes_and_sources():
    classes = np.repeat([0, 1], [90, 10])
    sources = np.array(["a"] * 80 + ["b"] * 10 + ["c"] * 10)
    at = statistics.even_sample(classes, sources, n=16)
    counts = pd.Series(zip(classes[at], sources[at])).value_counts().to_dict()
    assert counts == {(0, "a"): 4, (0, "b"): 4, (1, "c"): 8} and len(set(at)) == 16
    assert (at == statistics.even_sample(classes, sources, n=16)).all()
    assert sorted(statistics.even_sample(classes, sources, n=1000)) == list(range(100)), "no more than there are"


def test_figures_equal_scikit_learns(rng):
    truth = rng.integers(0, 5, 300)
    probabilities = rng.dirichlet(np.ones(5), 300)
    probabilities[np.arange(300), truth] += 0.3
    predicted = probabilities.argmax(1)
    weights = statistics.bootstrap_weights(np.arange(300) // 3, 200)
    got = classification.read_test(probabilities, truth, weights, CLASSES)
    assert got["accuracy"]["value"] == pytest.approx(accuracy_score(truth, predicted))
    assert got["macro_f1"]["value"] == pytest.approx(f1_score(truth, predicted, average="macro"))
    drawn = statistics.confusions(truth, predicted, weights, 5)
    assert statistics.macro_f1(drawn)[7] == pytest.approx(
        f1_score(truth, predicted, average="macro", sample_weight=weights[7])
    )
    tb = got["per_class"]["Tuberculosis"]
    assert tb["sensitivity"] == pytest.approx((predicted[truth == 2] == 2).mean())
    assert tb["specificity"] == pytest.approx((predicted[truth != 2] != 2).mean())


def test_bootstrap_draws_patients_whole():
    patients = np.array(["a", "a", "b", "c", "c", "c"])
    weights = statistics.bootstrap_weights(patients, 4000)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    correct = np.random.default_rng(1).random(400) < 0.8
    found = statistics.mean(correct, statistics.bootstrap_weights(np.arange(400), 4000))
    half = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / 400)
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.15)
    assert found["value"] - found["low"] == pytest.approx(half, rel=0.15)


def test_agreement_parts_the_unanimous_from_the_divided():
    target = np.eye(5)[[0, 1, 2, 3, 0]]
    target[4] = [1, 1, 0, 0, 0]  # a label that says "one of these two"
    said = {"a": np.array([0, 1, 2, 0, 1]), "b": np.array([0, 1, 4, 0, 1])}
    sure = {"a": np.ones(5, bool), "b": np.array([1, 1, 1, 0, 1], bool)}
    out = agreement.agreement(said, {name: np.ones(5, bool) for name in said}, target, np.arange(5), list("VWXYZ"))
    assert out["share_unanimous"] == 0.8
    assert out["groups"]["unanimous"]["accuracy"]["value"] == pytest.approx(3 / 4)
    assert out["groups"]["divided"]["n"] == 1
    claims = out["claims"]
    assert (claims["V"]["n"], claims["V"]["found"]["value"]) == (1, 1), "the partial label is not one of V"
    assert (claims["V"]["claimed"], claims["V"]["right"]["value"]) == (2, 0.5), "one of them is a Y"
    assert (claims["W"]["claimed"], claims["W"]["right"]["value"]) == (2, 1), "the partial label allows it"
    assert (claims["V"]["others"], claims["V"]["wrongly"]["value"]) == (3, pytest.approx(1 / 3)), "the Y again"
    assert claims["X"]["n"] == 1 and claims["X"]["found"]["value"] == 0 and "claimed" not in claims["X"]
    assert claims["Z"].keys() == {"others", "wrongly"}, "nobody has it and nobody says it"
    fewer = agreement.agreement(said, sure, target, np.arange(5), list("VWXYZ"))
    assert (out["share_claimed"], fewer["share_claimed"], fewer["share_unanimous"]) == (0.8, 0.6, 0.8)
    assert fewer["groups"]["unsure"] == {"n": 1, "accuracy": fewer["groups"]["unsure"]["accuracy"]}
    assert fewer["groups"]["unsure"]["accuracy"]["value"] == 0 and fewer["groups"]["claimed"]["n"] == 3
    assert (fewer["claims"]["V"]["claimed"], fewer["claims"]["V"]["others"]) == (1, 3), "the Y is claimed no more"
    assert fewer["claims"]["V"]["wrongly"]["value"] == 0
    text = "\n".join(agreement.lines({"agreement": {"manet": {"external": out}}}))
    assert "| external | V | 1 | 100.0 (" in text and "| external | Z | 0 |  | 5 | 0.0 (" in text


def test_a_network_that_is_alone_claims_what_it_is_sure_of():
    label = ["Normal", "COVID-19", "Tuberculosis", "COVID-19"]
    read = readings([0, 1, 2, 0, 0, 1, 2, 1], label=2 * label, split=4 * ["test"] + 4 * ["val"])
    found = agreement.measure(SimpleNamespace(tasks={"manet": ["a"]}, read={"a": read}.get))["manet"]["test"]
    assert (found["models"], found["share_unanimous"]) == (["a"], 1)
    assert found["claims"]["COVID-19"]["found"]["value"] == 0.5 and found["groups"]["claimed"]["n"] == 4
    with pytest.raises(NotMeasured, match="no X-ray has a label"):
        agreement.measure(SimpleNamespace(tasks={}, read=None))


def test_probe_reads_what_is_there_and_not_what_is_not(rng):
    target = np.repeat(["a", "b"], 100)
    features = rng.normal(size=(200, 8))
    known = features + 3 * (target == "b")[:, None]
    patients = np.arange(200)
    assert source_probe.probe(known, target, patients)["balanced_accuracy"]["value"] > 0.95
    assert 0.35 < source_probe.probe(features, target, patients)["balanced_accuracy"]["value"] < 0.65


def test_other_findings_are_told_by_doubt_and_by_quarrel():
    p = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.9, 0.1], [0.5, 0.5]]])
    np.testing.assert_allclose(other_findings.disagreement(p), 0, atol=1e-9)
    apart = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert other_findings.disagreement(apart)[0] == pytest.approx(np.log(2))
    r = readings([0, 1, 2, 2, 0, 0], label=LABELS, source=["nih"] * 4 + ["shenzhen", "nih"])
    told = other_findings.telling(np.array([0, 1, 2, 3, 9, 2.5]), (r.index.label == "Other finding").to_numpy(), r)
    assert told["all sources"]["value"] == pytest.approx(3 / 5) and told["one hospital"]["value"] == 3 / 4
    assert told["all sources"]["n"] == 1 and told["all sources"]["of"] == 6


def test_an_ensemble_is_the_mean_of_calibrated_probabilities():
    columns = {"label": ["Normal"] * 8 + ["COVID-19"], "split": ["val"] * 8 + ["test"]}
    often, seldom = readings([0] * 7 + [1, 0], **columns), readings([0, 1] * 4 + [1], **columns)
    assert often.temperature < seldom.temperature, "who errs more is believed less"
    both = ensemble.ensemble([often, seldom])
    np.testing.assert_allclose(both.probabilities, (often.probabilities + seldom.probabilities) / 2, atol=1e-6)
    assert list(both.predicted[[0, 1, 7, 8]]) == [0, 0, 1, 0] and not both.right[8], "the surer one prevails"
    assert list(both.index.label) == columns["label"] and both.task is often.task


def test_findings_count_known_labels_only():
    cells = ["Edema|Mass", "No Finding", "", "Edema"]
    r = readings([3, 0, 3, 3], NIH14, label="Normal", findings=cells)
    found = findings.findings(r, "test")
    assert found["n"] == 3 and found["findings"].keys() == {"Edema", "Mass"}
    assert found["findings"]["Edema"]["value"] == 1 and found["findings"]["Edema"]["n"] == 2
    assert found["findings"]["Mass"]["value"] == 0.5, "all tie"


def test_masks_of_every_source_are_measured_with_their_convention():
    masks = pd.DataFrame({
        "source": ["new", "new", "old", "old"], "patient": list("abcd"), "iou": [0.5, 1.0, 0.8, 0.6],
        "mask_convention": ["drawn so", "drawn so", "x", "y"],
    })  # fmt: skip
    found = segmentation.by_source(masks)
    assert found.keys() == {"new", "old, x", "old, y"} and found["new"]["mask_convention"] == "drawn so"
    assert found["new"]["iou"]["value"] == 0.75 and found["new"]["dice"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert segmentation.by_source(masks.drop(columns="mask_convention"))["new"]["mask_convention"] == ""


# --- lesions --------------------------------------------------------------------------------------------------------


def test_enrichment_of_a_drawn_lesion():
    """Lungs of 100 pixels, a lesion of 20, half of it outside of them; what lies outside counts nowhere."""
    lungs, lesion = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    lungs[:10, :10], lesion[:1, :20] = True, True
    assert localisation.enrichment(np.ones((20, 20)), lungs, lesion) == pytest.approx(1)
    heat = np.zeros((20, 20))
    heat[0, :10], heat[9, :10], heat[15] = 1, 3, 100
    assert localisation.enrichment(heat, lungs, lesion) == pytest.approx((10 / 40) / (10 / 100))
    assert not localisation.pointing(heat, lungs, lesion)
    heat[0, 3] = 4
    assert localisation.pointing(heat, lungs, lesion)
    assert np.isnan(localisation.enrichment(np.zeros((20, 20)), lungs, lesion))
    assert not localisation.pointing(np.zeros((20, 20)), lungs, lesion)


def test_another_patients_heatmap_gains_nothing_from_one_blob():
    patients = [f"p{i // 2}" for i in range(12)]
    other = localisation.others(patients)
    assert sorted(other) == list(range(12)) and all(patients[i] != patients[j] for i, j in enumerate(other))
    lungs, rng = np.ones((8, 8), bool), np.random.default_rng(0)
    lesions = [np.zeros((8, 8), bool) for _ in patients]
    for lesion in lesions:
        lesion[rng.integers(0, 4) :][:4, :4] = True
    blob = np.zeros((8, 8))
    blob[3, 2] = 1
    same = localisation.localise([blob] * 12, [lungs] * 12, lesions, patients)
    assert same["enrichment"]["value"] == pytest.approx(4) and same["enrichment_minus_other"]["value"] == 0
    own = localisation.localise([x.astype(float) for x in lesions], [lungs] * 12, lesions, patients)
    assert own["enrichment"]["value"] == pytest.approx(4) and own["enrichment_minus_other"]["low"] > 0
    assert own["pointing"]["value"] == 1 and own["n"] == 12


# --- explainers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gradcam", "layercam", "occlusion"])
def test_an_explainer_that_is_asked_for_one_class_makes_the_same_map(name):
    torch.manual_seed(0)
    net = create_classifier("efficientnet_lite0_ma", 3).eval().requires_grad_(False)
    image, mask = torch.rand(1, 64, 64), torch.ones(1, 64, 64)
    explainer = get_explainer(name)
    features = net.forward_features(image[None], mask[None])
    every = scale_maps(explainer.function(net, image[None], mask[None], features)[1], 64)
    heat, seconds = explainers.explained(net, image, mask, 2, explainer)
    np.testing.assert_allclose(heat, every[2], atol=1e-3)
    assert seconds > 0 and heat.max() > 0.9 and not np.allclose(every[1], every[2], atol=0.01)


def test_agreement_is_a_rank_correlation_inside_the_mask(rng):
    heat, mask = rng.random((8, 8)), np.zeros((8, 8))
    mask[2:6] = 1
    other = np.where(mask > 0, heat**3, 5)
    assert explainers.agreement(heat, other, mask) == pytest.approx(1)
    assert explainers.agreement(heat, -other, mask) == pytest.approx(-1)
    assert np.isnan(explainers.agreement(heat, np.ones((8, 8)), mask))


def test_explainers_are_compared_on_patients_whose_class_every_network_knows():
    labels = ["COVID-19", "Bacterial pneumonia", "COVID-19", "Pneumonia (unspecified)"] * 3
    lesions = [localisation.Lesion(Path(f"{i}.png"), label, f"p{i // 2}", ()) for i, label in enumerate(labels)]
    drawn = explainers.sample(lesions, {"manet", "guided"}, 99)
    assert sorted(lesion.patient for lesion in drawn) == [f"p{i}" for i in range(6)]
    assert {lesion.label for lesion in drawn} <= {"COVID-19", "Bacterial pneumonia"}
    assert {lesion.label for lesion in explainers.sample(lesions, {"covid"}, 99)} == {"COVID-19"}
    assert explainers.sample(lesions, {"manet", "guided"}, 3) == drawn[:3], "more X-rays come after those of before"


def test_explainers_are_compared_network_by_network(hospitals, tmp_path, monkeypatch):
    tasks = {"efficientnet_lite0": "manet", "efficientnet_lite0_ma": "manet", "alexnet_attn1": "guided"}
    weights = tmp_path / "weights"
    weights.mkdir()
    make_weights(weights, tasks, alexnet_attn1={"size": 96, "sees": "whole"})
    compared = ("gradcam", "occlusion", "attention")
    study = Study(hospitals, weights, tmp_path / "cache", explained=3, compared=compared)
    found = explainers.measure(study)
    assert found["n"] == 3 and found["models"].keys() == {"plain", "mask attention", "AlexNet with attention"}
    of_plain, of_attention = (found["models"][kind]["explainers"] for kind in ("plain", "AlexNet with attention"))
    assert list(of_plain) == ["gradcam", "occlusion", explainers.OTHER], "attention suits AlexNet alone"
    assert list(of_attention) == [*compared, explainers.OTHER]
    assert of_plain["gradcam"]["agreement"]["value"] == pytest.approx(1) and of_plain["occlusion"]["seconds"] > 0
    text = "\n".join(explainers.lines({"explainers": found}))
    assert "| CBAM: no weights in this manifest |" in text and "3 X-rays" in text and "nan |" not in text

    lesions = explainers.sample(localisation.read_lesions(hospitals), {"manet", "guided"}, 3)
    all_cases = list(explainers.cases({"plain": (study, "efficientnet_lite0")}, lesions))
    heats = [case["plain"].heat(study, "gradcam")["heat"] for case in all_cases]
    erased = [case["plain"].erased(heats[other])["deletion"] for case, other in zip(all_cases, (1, 0, 1))]
    assert of_plain[explainers.OTHER]["deletion"]["value"] == pytest.approx(np.mean(erased), abs=1e-6)

    def none(*_):
        raise AssertionError("it was in the cache")

    monkeypatch.setattr(explainers, "explained", none)
    assert explainers.measure(study) == found

    entries = read_manifest(weights)
    own = {name: entry for name, entry in entries.items() if name != "alexnet_attn1"}
    write_manifest(weights / "manifest.json", own)
    write_manifest(weights / "other.json", entries)
    apart = explainers.measure(replace(study, beside=(weights / "other.json",)))
    assert apart["models"]["AlexNet with attention"].pop("weights") == "other.json", "own networks come first"
    assert apart == found, "two sets are compared as one would be"
    with pytest.raises(NotMeasured, match="two patients"):
        explainers.measure(Study(hospitals, weights, tmp_path / "cache", explained=1))


# --- controls -------------------------------------------------------------------------------------------------------


def test_the_share_that_needs_no_lungs_is_counted_above_chance():
    right, drawn = 0.8, np.full(4, 0.8)
    share = controls.needless((0.6, np.array([0.5, 0.6, 0.6, 0.7])), (right, drawn), (0.4, np.full(4, 0.4)))
    assert share["value"] == pytest.approx(0.5) and share["low"] < 0.5 < share["high"]
    value, replicates = controls.over_seeds([(0.2, np.full(5000, 0.2)), (0.4, np.full(5000, 0.4))], 0)
    assert value == pytest.approx(0.3)
    assert 0.45 < np.isclose(replicates, 0.3).mean() < 0.55, "of two seeds, half of the draws have both"
    assert np.ptp(replicates) / 2 > 0.1 * 12.7 / 1.96, "two seeds tell little of their spread: as wide as Student's t"
    assert controls.share_without_lungs({"lungs": {}}).endswith("not measured.")
    both = {sees: {"accuracy": {"value": value}} for sees, value in (("lungs", 0.8), ("outside", 0.6))}
    assert "60.0 with the lungs blacked out" in controls.share_without_lungs(both)
    assert controls.share_without_lungs(both).endswith("not measured.")


def test_controls_of_another_recipe_are_not_kept_beside_new_ones():
    recorded = {
        sees: {"settings": {"model": "vgg16", "epochs": epochs, "sees": sees}}
        for sees, epochs in (("lungs", 16), ("shape", 16), ("whole", 20))
    }
    found = {"outside": {"settings": {"model": "vgg16", "epochs": 20, "sees": "outside"}}}
    assert controls.merged(recorded, found) == {"whole": recorded["whole"]} | found
    assert controls.merged(recorded, {}) == {}


def test_controls_are_averaged_over_seeds_and_compared_with_the_lungs():
    label = ["Normal", "COVID-19"] * 50
    truth = np.array([0, 1] * 50)
    runs = [(Recipe(sees="lungs", seed=seed), readings(truth, label=label)) for seed in (0, 1)]
    half = np.where(np.arange(100) < 50, truth, 0)
    runs.append((Recipe(sees="outside"), readings(half, label=label)))
    found = controls.compare(runs)
    assert found["lungs"]["seeds"] == [0, 1] and found["lungs"]["accuracy"]["value"] == 1
    assert found["outside"]["minus_lungs"]["accuracy"]["value"] == pytest.approx(-0.25)
    assert found["outside"]["needs_no_lungs"]["accuracy"]["value"] == pytest.approx((0.75 - 0.5) / (1 - 0.5))
    assert found["outside"]["needs_no_lungs"]["class_mean"]["value"] == pytest.approx((0.75 - 0.2) / (1 - 0.2))
    text = controls.share_without_lungs(found)
    assert percent(found["outside"]["needs_no_lungs"]["accuracy"]) in text and "75.0 with the lungs blacked out" in text
    assert "minus_lungs" not in controls.compare(runs[2:])["outside"], "without the one that sees them: not measured"


def test_results_and_documents_follow_the_manifest(tmp_path):
    weights = tmp_path / "weights"
    assert str(results_folder(weights, None)) == "results" == str(results_folder(weights / "manifest.json", None))
    assert str(results_folder(weights / "other.json", None)) == "results/other"
    assert results_folder(weights / "other.json", tmp_path) == tmp_path
    weights.mkdir()
    (weights / "MODEL_CARD.md").write_text("")
    assert documents(weights) == [weights / "MODEL_CARD.md"] and documents(weights / "other.json") == []


# --- all of it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hospitals(phantoms, tmp_path):
    """The phantoms, eight more that play external X-rays, four with another finding, and four outlines of lesions."""
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index["image"], index["mask"] = (str(phantoms) + "/" + index[column] for column in ("image", "mask"))
    outside = index[:8].assign(split="external", source="nih", mask="", patient=[f"x{i}" for i in range(8)])
    outside["label"] = ["COVID-19", "Tuberculosis", "Normal", "Pneumonia (unspecified)"] * 2
    odd = index[8:12].assign(split="test", source="nih", mask="", label="Other finding", patient=list("abcd"))
    pd.concat([index, outside, odd]).to_csv(tmp_path / "index.csv", index=False)
    lesions = index[index.label == "Bacterial pneumonia"][:4]
    columns = {"image": lesions.image, "label": lesions.label, "ggo": lesions["mask"], "consolidation": ""}
    pd.DataFrame(columns).to_csv(tmp_path / "lesions.csv", index=False)
    return tmp_path


def test_an_interrupted_evidence_keeps_what_was_measured(hospitals, random_weights, run, tmp_path, monkeypatch):
    common = ["--data", hospitals, "--weights", random_weights, "--cache", tmp_path / "cache"]
    common += ["--results", tmp_path / "results", "--controls", tmp_path / "none"]

    def interrupt(study):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evidence.duplicates, "measure", interrupt)
        with pytest.raises(SystemExit, match="--only splits controls`"):
            run(evidence, *common, "--only", "groups", "splits", "controls")
    kept = json.loads((tmp_path / "results" / "evidence.json").read_text())
    assert kept.keys() == {"models"} and all("groups" in m for m in kept["models"].values())
    run(evidence, *common, "--only", "splits", "controls")
    found = json.loads((tmp_path / "results" / "evidence.json").read_text())
    assert found["models"] == kept["models"] and found["splits"]["patients_crossing"] == 0
    page = (tmp_path / "results" / "evidence.md").read_text()
    assert "## Sensitivity by class and source" in page and f"* {controls.TITLE}" in page.split("## Not measured")[1]


def test_figures_of_other_weights_do_not_stay(hospitals, random_weights, tmp_path):
    study = Study(hospitals, random_weights, tmp_path)
    path = tmp_path / "evidence.json"
    old = {"efficientnet_lite0": {"sha256": "another", "groups": {}}, "gone": {"sha256": "x"}}
    path.write_text(json.dumps({"models": old, "splits": {"pictures": 1}}))
    begun = evidence.begin(path, study)
    assert begun["splits"] == {"pictures": 1} and "gone" not in begun["models"]
    assert begun["models"]["efficientnet_lite0"].keys() == {"sha256", "task"}
    robust = {"n": 1, "pixels": 64, "changes": {"none": {"efficientnet_lite0": {"value": 1, "low": 1, "high": 1}}}}
    for weights, old in (("another", True), (begun["models"]["efficientnet_lite0"]["sha256"], False)):
        of = {"measured_of": {"robustness": {"efficientnet_lite0": weights}}, "robustness": robust}
        told = "**Measured of earlier weights of `efficientnet_lite0`**; `--only robustness`"
        assert (told in evidence.markdown({"models": begun["models"]} | of)) == old


def test_a_network_is_measured_as_the_pipeline_reads_it(hospitals, many_tasks, tmp_path):
    """Same mask, same crop, same temperature: for each task, and for networks that are shown the lungs' box alone."""
    study = Study(hospitals, many_tasks, tmp_path / "cache")
    pipe = Pipeline.load(many_tasks)
    for name in study.entries:
        r = study.read(name)
        probabilities = softmax(r.logits, 1) if r.task.exclusive else 1 / (1 + np.exp(-r.logits))
        for i in (0, 5):
            said = pipe.analyze(load_xray(r.index.image[i])).readings[name].probabilities
            assert list(said) == list(r.task.classes)
            np.testing.assert_allclose(list(said.values()), probabilities[i], atol=2e-2)
    again = Study(hospitals, many_tasks, tmp_path / "cache").read("resnet34_ma")
    np.testing.assert_array_equal(again.logits, study.read("resnet34_ma").logits)


def test_a_missing_temperature_is_fitted_by_evaluate(hospitals, many_tasks, run, tmp_path):
    weights = tmp_path / "weights"
    shutil.copytree(many_tasks, weights)
    entries = read_manifest(weights)
    expected = entries["efficientnet_lite0"].pop("temperature")
    entries = {name: entry for name, entry in entries.items() if entry["task"] != "nih14"}
    write_manifest(weights / "other.json", entries)
    (tmp_path / "README.md").write_text("<!-- evaluation -->\n<!-- /evaluation -->\n")
    common = ["--data", hospitals, "--weights", weights / "other.json", "--cache", tmp_path / "cache"]
    run(evaluate, *common, "--results", tmp_path / "results", "--record")
    written = read_manifest(weights / "other.json")
    assert written["efficientnet_lite0"]["temperature"] > 0 and expected == 1
    assert written["efficientnet_lite0_ma"]["figures"]["test"]["task"] == "guided"
    assert (tmp_path / "README.md").read_text().count("\n") == 2, "the README tells of manifest.json alone"
    assert read_manifest(weights)["efficientnet_lite0"]["temperature"] == 1
    text = (tmp_path / "results" / "evaluation.md").read_text()
    assert "Five classes" in text and "Normal, pneumonia or COVID-19" in text and "kermany" in text


def test_the_whole_evidence(hospitals, random_weights, run, tmp_path):
    """Every section is measured, the page is written, and the pipeline uses the temperature that was recorded."""
    weights = tmp_path / "weights"
    shutil.copytree(random_weights, weights)
    (weights / "MODEL_CARD.md").write_text("<!-- evidence -->\n<!-- /evidence -->\n")
    common = ["--data", hospitals, "--weights", weights, "--cache", tmp_path / "cache"]
    small = ["--size", 64, "--batch", 8, "--epochs", 1, "--device", "cpu", "--workers", 0]
    out = tmp_path / "controls" / "outside"
    run(classify, *common, *small, "--model", "efficientnet_lite0", "--sees", "outside", "--out", out)
    with pytest.raises(SystemExit, match="control"):
        run(export, "--run", out, "--weights", weights)
    (out.parent / "stray").mkdir()
    (out.parent / "stray" / "result.json").write_text("[]")
    results = tmp_path / "results"
    run(familiarity, *common, "--share", 0.9)
    run(teach_pose, *common, "--most", 8)
    recipes = tmp_path / "recipes"
    shutil.copytree(out, recipes / "again")
    runs = ["--controls", out.parent, "--recipes", recipes, "--results", results]
    run(evidence, *common, *runs, "--heatmaps", 5, "--disturbed", 5, "--explainers", "gradcam", "--explained", 2,
        "--compare", "gradcam", "--record")  # fmt: skip

    found = json.loads((results / "evidence.json").read_text())
    assert list(found["models"]) == ["efficientnet_lite0", "efficientnet_lite0_ma", "efficientnet_lite0_cbam"]
    assert found["controls"].keys() == {"outside"} and found["controls"]["outside"]["n"] == 8
    blind = found["controls"]["outside"]["external"]["adult normals"]["all"]["sensitivity"]
    assert found["recipes"]["again"]["external"]["adult normals"]["all"]["sensitivity"] == blind
    assert f"control, lungs blacked out | {percent(found['controls']['outside']['accuracy'])} |" in evidence.headline(
        found
    )
    assert "not measured" in evidence.headline(found), "no control sees the lungs"
    assert found["splits"]["near_duplicates"]["external – train"] >= 8, (
        "which are copies; other phantoms are much alike"
    )
    first = found["models"]["efficientnet_lite0"]
    assert set(first["external"]) == {"COVID-19", "tuberculosis", "adult normals", "adult pneumonia"}
    assert first["calibration"]["external"]["n"] == first["external_pooled"]["n"] == 6, "two are of an unknown kind"
    assert first["groups"]["external"]["n"] == 8, "which are read well or badly all the same"
    assert (results / "reliability.png").stat().st_size > 10_000
    assert first["last_layer"] is None and first["as_trained"]["confusion"] == first["test"]["confusion"]
    assert first["as_trained"]["external"] == first["external"], "a network without a new layer is as it was trained"
    disturbed = found["robustness"]
    assert found["pose"]["test"]["n"] == 5 and found["pose"].keys() == {"test", "external"}
    assert disturbed["n"] == 5 and disturbed["changes"].keys() == robustness.CHANGES.keys()
    noisy, calm = (disturbed["changes"][c]["efficientnet_lite0"] for c in ("Gaussian noise, σ = 0.05", "none"))
    assert noisy["minus none"]["value"] == pytest.approx(noisy["value"] - calm["value"])
    assert found["localisation"]["n"] == 4 and found["localisation"]["covered"]["value"] >= 0
    assert found["localisation"]["models"]["efficientnet_lite0"].keys() == {"gradcam"}
    assert found["other_findings"]["manet"]["n"] == 4 and (
        found["agreement"]["manet"]["external"]["models"] == list(found["models"])
    )
    assert found["heatmaps"]["manet"]["n"] == 5 and found["explainers"]["n"] == 2
    together = found["ensemble"]["manet"]
    assert together["models"] == list(found["models"]) == list(together["each"]) and together["test"]["n"] == 8
    assert together["figures"]["accuracy"] == together["test"]["accuracy"]
    best = together["each"][together["best"]]["accuracy"]["value"]
    assert together["minus_best"]["accuracy"]["value"] == pytest.approx(together["test"]["accuracy"]["value"] - best)
    assert f"| mean of the 3 networks | {percent(together['test']['accuracy'])} |" in evidence.headline(found)
    changed = found | {"measured_of": {"ensemble": dict.fromkeys(found["models"], "other weights")}}
    assert "mean of the" not in evidence.headline(changed)
    rows = classification.confusion_by_source(found["models"])
    test_rows = [row for row in rows if row[0].startswith("test") and row[3] == "`efficientnet_lite0`"]
    assert sum(sum(row[4:]) for row in test_rows) == 8 and all(sum(row[4:]) == row[2] for row in rows)
    page = (results / "evidence.md").read_text()
    for section, module in evidence.SECTIONS.items():
        there = section not in ("findings", "last_layer")
        assert (f"## {module.TITLE}\n" in page) == there, section
    assert evidence.headline(found) in (weights / "MODEL_CARD.md").read_text()

    shutil.rmtree(out)
    run(evidence, *common, *runs, "--only", "controls")
    assert json.loads((results / "evidence.json").read_text()) == found, "what is not at hand stays as recorded"
    sets = found["ood"]["sets"]
    assert sets["photographs, CT, MR"]["n"] > 100 and sets["external: nih"]["n"] == 8

    pipe = Pipeline.load(weights)
    a = pipe.analyze(phantom(96, 0))
    assert a.distance == pytest.approx(a.to_dict()["distance"]) and np.isfinite(a.distance)
    assert pipe.entries["efficientnet_lite0"]["temperature"] == first["calibration"]["temperature"]


def test_a_set_without_a_network_of_one_answer_is_told_so(hospitals, many_tasks, tmp_path):
    entries = {name: e for name, e in read_manifest(many_tasks).items() if e["task"] in ("segment", "nih14")}
    (tmp_path / "weights").mkdir()
    write_manifest(tmp_path / "weights", entries)
    study = Study(hospitals, tmp_path / "weights", tmp_path / "cache")
    for measure in (robustness.measure, localisation.measure, explainers.measure):
        with pytest.raises(NotMeasured, match="one answer"):
            measure(study)


def test_every_section_has_a_title_and_tells_nothing_of_nothing():
    for section, module in evidence.SECTIONS.items():
        assert module.TITLE and callable(module.measure) and callable(module.lines), section
    page = evidence.markdown({"models": {}})
    assert all(f"* {module.TITLE}" in page for module in evidence.SECTIONS.values())


def test_a_block_is_written_between_its_marks(tmp_path):
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- b -->\nold\n<!-- /b -->\nc\n")
    write_between(path, "b", "new \\1\n")
    assert path.read_text() == "a\n<!-- b -->\nnew \\1\n<!-- /b -->\nc\n"
