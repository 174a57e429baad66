"""The measures behind the evidence, each against arithmetic that was done another way."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import brier_score_loss

from manet_core import CLASSES, Pipeline
from manet_core.phantom import phantom
from manet_core.preprocess import SEES, network_input
from train import attention_study, classify, evidence, export, familiarity, robustness
from train.calibration import (
    brier,
    calibration,
    error_by_chance,
    expected_calibration_error,
    fit_temperature,
    reliability,
    spare_margins,
)
from train.duplicates import crossing_patients, near_duplicates
from train.evaluate import percent

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
    right, wrong = (attention_study.erasure(Corner(), image, mask, 1, heat) for heat in (true, false))
    assert right[0] < wrong[0] and right[1] > wrong[1]


def test_measures_of_a_heatmap_by_hand():
    heat, mask = np.zeros((4, 4)), np.zeros((4, 4))
    heat[0], mask[:, :2] = 1, 1
    assert attention_study.in_lung(heat, mask) == pytest.approx(0.5)
    assert attention_study.spread(heat) == pytest.approx(np.log(4) / np.log(16))
    assert attention_study.spread(np.ones((4, 4))) == pytest.approx(1)
    assert attention_study.correlation(heat, heat) == pytest.approx(1)
    assert np.isnan(attention_study.correlation(heat, np.ones((4, 4))))
    assert attention_study.in_lung(np.zeros((4, 4)), mask) == 0


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


def test_telling_apart_by_hand():
    out = familiarity.telling_apart([1, 2, 3, 4], [3.5, 5, 6, 7], limit=3.2)
    assert out["auroc"] == pytest.approx(15 / 16) and out["caught"] == 1
    assert familiarity.telling_apart([1, 2], [3, 4], 3.5)["caught"] == 0.5
    assert out["false_alarms_at_95"] == 0.25  # 95 % of the strangers lie above 3.725


def test_packaged_pictures_and_spoilt_xrays_are_what_they_say(rng):
    strangers = familiarity.packaged_pictures(64)
    assert len(strangers) % 4 == 0 and len(strangers) > 100
    assert all(x.shape == (64, 64) and x.dtype == np.float32 for x in strangers)
    x = phantom(64, 0).pixels
    spoilt = {name: kind[0] for name, kind in familiarity.spoilt([x]).items()}
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


def test_external_groups_count_the_right_answers():
    index = pd.DataFrame({
        "split": ["external"] * 5 + ["test"], "source": ["nih"] * 6, "patient": list("abcdef"),
        "label": ["Normal", "Normal", "Pneumonia (unspecified)", "Viral pneumonia", "Tuberculosis", "Normal"],
    })  # fmt: skip
    called = [0, 2, 4, 3, 0, 0]
    out = evidence.external(np.eye(5)[called], index)
    assert out["adult normals"]["all"]["n"] == 2 and out["adult normals"]["nih"]["right"]["value"] == 0.5
    assert out["adult pneumonia"]["all"]["right"]["value"] == 1 and out["tuberculosis"]["all"]["right"]["value"] == 0
    assert out["adult normals"]["all"]["called"]["Tuberculosis"] == 1
    assert "COVID-19" not in out, "there is none"


def test_intervals_of_all_and_none_are_not_empty(rng):
    """Three of three right proves little; 1 − 0.025^(1/n) by hand. Many X-rays of one patient count as one."""
    none = evidence.share(np.zeros(6, bool), np.repeat(["a", "b", "c"], 2))
    assert (none["value"], none["low"]) == (0, 0) and none["high"] == pytest.approx(1 - 0.025 ** (1 / 3))
    every = evidence.share(np.ones(3, bool), np.arange(3))
    assert (every["value"], every["high"]) == (1, 1) and every["low"] == pytest.approx(0.025 ** (1 / 3))
    right = rng.random(400) < 0.7
    some = evidence.share(right, np.arange(400))
    assert some["value"] == right.mean() and some["high"] - some["low"] == pytest.approx(2 * 1.96 * 0.0229, rel=0.1)


def test_agreement_parts_the_unanimous_from_the_divided():
    truth = np.array([0, 1, 2, 3])
    a, b = np.eye(5)[[0, 1, 2, 0]], np.eye(5)[[0, 1, 4, 0]]
    out = evidence.agreement({"a": a, "b": b}, truth, np.arange(4))
    assert out["share_unanimous"] == 0.75
    assert out["groups"]["unanimous"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert out["groups"]["divided"]["n"] == 1


def test_share_of_accuracy_without_lung_tissue():
    """The controls' accuracies against each other, and against always answering the commonest class."""

    def control(value):
        return {"n": 10, "accuracy": {"value": value}, "confusion": np.diag([4, 3, 1, 1, 1]).tolist()}

    sentence = evidence.lungless({"lungs": control(0.8), "outside": control(0.6)})
    assert "75 %" in sentence and "60.0 of 80.0" in sentence and "40.0" in sentence
    assert evidence.lungless({"lungs": control(0.8)}).endswith("not measured.")


def test_probe_reads_what_is_there_and_not_what_is_not(rng):
    target = np.repeat(["a", "b"], 100)
    features = rng.normal(size=(200, 8))
    known = features + 3 * (target == "b")[:, None]
    patients = np.arange(200)
    assert evidence.probe(known, target, patients)["balanced_accuracy"]["value"] > 0.95
    assert 0.35 < evidence.probe(features, target, patients)["balanced_accuracy"]["value"] < 0.65


# --- all of it ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hospitals(phantoms, tmp_path):
    """The phantoms, and eight more that play other hospitals' X-rays."""
    index = pd.read_csv(phantoms / "index.csv", dtype=str, keep_default_na=False)
    index["image"], index["mask"] = (str(phantoms) + "/" + index[column] for column in ("image", "mask"))
    other = index[:8].assign(split="external", source="nih", mask="", patient=[f"x{i}" for i in range(8)])
    other["label"] = ["COVID-19", "Tuberculosis", "Normal", "Pneumonia (unspecified)"] * 2
    pd.concat([index, other]).to_csv(tmp_path / "index.csv", index=False)
    return tmp_path


def test_an_interrupted_evidence_keeps_what_was_measured(hospitals, random_weights, run, tmp_path, monkeypatch):
    common = ["--data", hospitals, "--weights", random_weights, "--cache", tmp_path / "cache", "--out", tmp_path]

    def interrupt(args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "splits", interrupt)
        with pytest.raises(SystemExit, match="--only splits`"):
            run(evidence, *common, "--only", "controls", "splits", "--controls", tmp_path / "none")
    assert json.loads((tmp_path / "evidence.json").read_text()) == {"controls": {}}
    with pytest.raises(SystemExit, match="--only strangers models recipes heatmaps disturbances`"):
        run(evidence, *common, "--only", "splits")


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
    results = tmp_path / "results"
    with pytest.raises(SystemExit, match="train.familiarity"):
        run(evidence, *common, "--out", results)
    run(familiarity, *common, "--share", 0.9)
    recipes = tmp_path / "recipes"
    shutil.copytree(out, recipes / "again")
    runs = ["--controls", out.parent, "--recipes", recipes]
    run(evidence, *common, *runs, "--out", results, "--heatmaps", 5, "--disturbed", 5, "--record")

    found = json.loads((results / "evidence.json").read_text())
    assert list(found["models"]) == ["efficientnet_lite0", "efficientnet_lite0_ma", "efficientnet_lite0_cbam"]
    assert found["controls"]["outside"]["n"] == 8 and found["splits"]["patients_crossing"] == 0
    blind = found["controls"]["outside"]["external"]["adult normals"]["all"]["right"]
    assert found["recipes"]["again"]["external"]["adult normals"]["all"]["right"] == blind
    assert f"lungs blacked out | {percent(found['controls']['outside']['accuracy'])} |" in evidence.headline(found)
    assert found["splits"]["near_duplicates"]["external – train"] >= 8, (
        "which are copies; other phantoms are much alike"
    )
    first = found["models"]["efficientnet_lite0"]
    assert set(first["external"]) == {"COVID-19", "tuberculosis", "adult normals", "adult pneumonia"}
    assert first["calibration"]["external"]["n"] == first["external_pooled"]["n"] == 6, "two have another label"
    assert (results / "reliability.png").stat().st_size > 10_000
    assert first["last_layer"] is None and first["as_trained"]["confusion"] == first["test"]["confusion"]
    assert first["as_trained"]["external"] == first["external"], "a network without a new layer is as it was trained"
    disturbed = found["disturbances"]
    assert disturbed["n"] == 5 and disturbed["changes"].keys() == robustness.CHANGES.keys()
    noisy, calm = (disturbed["changes"][c]["efficientnet_lite0"] for c in ("Gaussian noise, σ = 0.05", "none"))
    assert noisy["minus none"]["value"] == pytest.approx(noisy["value"] - calm["value"])
    rows = evidence.confusion_by_source(found["models"])
    test_rows = [row for row in rows if row[0].startswith("test") and row[3] == "`efficientnet_lite0`"]
    assert sum(sum(row[4:]) for row in test_rows) == 8 and all(sum(row[4:]) == row[2] for row in rows)
    page = (results / "evidence.md").read_text()
    for title in (
        "By class",
        "Other hospitals",
        "Without lung tissue",
        "Recipes",
        "source",
        "Calibration",
        "agree",
        "Heatmaps",
        "Disturb",
        "networks know",
        "Splits",
    ):
        assert title in page
    assert evidence.headline(found) in (weights / "MODEL_CARD.md").read_text()

    shutil.rmtree(out)
    run(evidence, *common, *runs, "--out", results, "--only", "controls")
    assert json.loads((results / "evidence.json").read_text()) == found, "what is not at hand stays as recorded"

    strangers = found["strangers"]["strangers"]
    assert strangers["photographs, CT, MR"]["n"] > 100 and strangers["other hospitals: nih"]["n"] == 8

    pipe = Pipeline.load(weights)
    a = pipe.analyze(phantom(96, 0))
    assert a.distance == pytest.approx(a.to_dict()["distance"]) and np.isfinite(a.distance)
    assert pipe.entries["efficientnet_lite0"]["temperature"] == first["calibration"]["temperature"]
    x = phantom(96, 3)
    cool = pipe.analyze(x).readings["efficientnet_lite0"].probabilities
    pipe.entries["efficientnet_lite0"]["temperature"] = 0.01
    hot = pipe.analyze(x).readings["efficientnet_lite0"].probabilities
    assert max(hot.values()) > max(cool.values()) and set(cool) == set(CLASSES)
