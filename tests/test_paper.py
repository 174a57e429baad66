"""The paper's experiment on phantoms, and its tables and verdicts on runs whose answer is known."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from serving import processes

from manet_core import CLASSES, list_models
from train import paper, record, tables
from train.recipe import Recipe, Run

RECIPE = Recipe(model="resnet34", epochs=8, size=224)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module", autouse=True)
def once():
    """Table 3 is counted and timed once, as it is the same in every report of these networks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("table_3", "benchmark_mask_attention"):
            patch.setattr(paper, name, _copied(getattr(paper, name)))
        yield


def _copied(function):
    known = cache(function)
    return lambda *arguments: deepcopy(known(*arguments))


@pytest.fixture
def no_heatmaps(monkeypatch):
    """Fig. 9, which a test before has drawn, is left away."""
    monkeypatch.setattr(paper.figures, "heatmaps", lambda *_: [])


def options(phantoms, random_weights, out, cache, *more):
    small = "--size 64 --batch 8 --epochs 2 --lr 0.001 --device cpu --workers 0 --repeats 1".split()
    models = ["--models", "efficientnet_lite0", "efficientnet_lite0_ma"]
    return ["--data", phantoms, "--weights", random_weights, "--out", out, "--cache", cache, *small, *models, *more]


def test_the_whole_experiment(phantoms, random_weights, experiment, run, capsys):
    """Trains what is missing, skips what is finished, and writes every table and figure."""
    out, cache, record = experiment / "paper", experiment / "cache", experiment / "record"
    arguments = options(phantoms, random_weights, out, cache, "--trials", 2, "--record", record)
    run(paper, *arguments)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    page = (out / "tables.md").read_text(encoding="utf-8")
    for split in ("patient", "image"):
        models = results["splits"][split]["models"]
        assert list(models) == ["efficientnet_lite0", "efficientnet_lite0_ma"]
        assert all(len(m["accuracy"]) == 2 and m["complete"] for m in models.values())
    assert results["splits"]["patient"]["patients_in_train_and_test"] == 0
    assert results["splits"]["patient"]["models"]["efficientnet_lite0_ma"]["minus_plain"]["trials"] == 2
    assert {v["verdict"] for v in results["verdicts"] if v["split"] != "any"} == {"not enough runs"}, "of two trials"
    for title in ("Table 1", "Table 2", "Table 3", "Table 4", "Table 5", "Lung masks", "Fig. 10", "claims"):
        assert title in page
    assert "2 of 2" in page and "split by image − split by patient" in page
    assert {path.name for path in record.iterdir()} == {"results.json", "runs.json", "tables.md", "fig10.png"}
    assert (out / "fig9-efficientnet_lite0-patient.png").exists()

    weights = sorted(out.glob("*/*/*/best.safetensors"))
    before = [path.stat().st_mtime_ns for path in weights]
    assert len(weights) == 8
    capsys.readouterr()
    run(paper, *arguments)
    assert "8 of 8 trainings are finished" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in weights] == before


def test_side_by_side_ends_with_the_same_weights(phantoms, random_weights, experiment, run, no_heatmaps, monkeypatch):
    """Two trainings at once, each in its process, equal the same trainings one after another.

    The processes are forked from one that has imported PyTorch, where the command starts new ones.
    """
    monkeypatch.setattr(paper.multiprocessing, "get_context", lambda _: processes)
    out = experiment / "jobs"
    run(
        paper,
        *options(phantoms, random_weights, out, experiment / "cache", "--trials", 1, "--split", "patient", "--jobs", 2),
    )
    for model in ("efficientnet_lite0", "efficientnet_lite0_ma"):
        file = f"patient/{model}/0/best.safetensors"
        ours, theirs = load_file(out / file), load_file(experiment / "paper" / file)
        assert all((ours[key] == theirs[key]).all() for key in theirs), model


def test_an_empty_folder_has_nothing_to_report(phantoms, random_weights, tmp_path, run):
    with pytest.raises(SystemExit, match="no finished training"):
        run(paper, *options(phantoms, random_weights, tmp_path, tmp_path, "--report"))


def test_stray_and_broken_folders_are_left_out(phantoms, random_weights, experiment, tmp_path, capsys):
    """A file in between, a folder that is no training, one that was copied in part, one under another's name."""
    out = shutil.copytree(experiment / "paper", tmp_path / "paper")
    one = out / "patient" / "efficientnet_lite0"
    (out / "patient" / "notes.txt").touch()
    shutil.copytree(one / "0", out / "patient" / "holiday" / "0")
    shutil.copytree(one / "0", one / "backup")
    shutil.copytree(one / "0", one / "7")
    for number, missing in (("3", "log.csv"), ("4", "best.safetensors")):
        (shutil.copytree(one / "0", one / number) / missing).unlink()
    (shutil.copytree(one / "0", one / "5") / "result.json").write_text("{}", encoding="utf-8")
    (shutil.copytree(one / "0", one / "6") / "result.json").write_text("half a fi", encoding="utf-8")
    run = Run(phantoms, cache=experiment / "cache", weights=random_weights, device="cpu")
    found = {(each["split"], each["model"], each["trial"]) for each in paper.finished_runs(out, run, [])}
    names = ("efficientnet_lite0", "efficientnet_lite0_ma")
    assert found == {(split, name, trial) for split in ("patient", "image") for name in names for trial in (0, 1)}
    said = capsys.readouterr().out
    assert all(f"{one / number} holds no whole training" in said for number in "3456")
    assert f"{one / '7'} holds another training than its name says" in said


def test_shipped_weights_stand_in_for_a_trial(phantoms, random_weights, experiment, run, tmp_path, no_heatmaps):
    """They are there with their own recipe and without a curve, and only where nothing was trained."""
    weights = tmp_path / "weights"
    shutil.copytree(random_weights, weights)
    manifest = json.loads((weights / "manifest.json").read_text(encoding="utf-8"))
    for name, entry in manifest["models"].items():
        settings = {"model": name, "epochs": 77, "size": 64, "batch": 8, "lr": 0.001}
        entry["training"] = {"settings": settings}
    (weights / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    out, names = experiment / "paper", ["efficientnet_lite0", "efficientnet_lite0_cbam"]
    arguments = options(phantoms, weights, out, experiment / "cache", "--report", "--shipped", *names)
    run(paper, *arguments, "--record", tmp_path / "record")
    results = json.loads((tmp_path / "record" / "results.json").read_text(encoding="utf-8"))
    models = results["splits"]["patient"]["models"]
    epochs = {name: results["recipes"][model["recipe"]["0"]]["epochs"] for name, model in models.items()}
    assert epochs["efficientnet_lite0"] == 2, "trained: the shipped weights are not needed"
    recorded = ["--out", tmp_path / "elsewhere", "--record", tmp_path / "record"]
    run(paper, *options(phantoms, weights, out, experiment / "cache", "--report", *recorded))
    again = json.loads((tmp_path / "record" / "results.json").read_text(encoding="utf-8"))
    assert again["splits"]["patient"]["models"] == models, "what was recorded counts without its folders"
    cbam = models["efficientnet_lite0_cbam"]
    assert epochs["efficientnet_lite0_cbam"] == 77 and cbam["curve"] == {"0": []}
    assert cbam["minus_plain"] is None, "another recipe than the plain network's"
    with pytest.raises(SystemExit, match="no weights of vgg16"):
        run(paper, *options(phantoms, weights, out, experiment / "cache", "--report", "--shipped", "vgg16"))


def test_runs_that_were_tested_on_other_xrays_are_left_out(tmp_path, capsys):
    rows = pd.DataFrame({"label": [CLASSES[0], CLASSES[3]], "patient": ["a", "b"]})
    run = make_run("resnet34", 0, 2, CALM.tolist(), pictures=2)
    record.write_runs(tmp_path / "runs.json", [run], {"patient": rows})
    (read,) = record.read_runs(tmp_path / "runs.json", [], {"patient": rows})
    assert read["predicted"].tolist() == run["predicted"].tolist() and read["accuracy"] == run["accuracy"]
    assert read["recipe"] == run["recipe"]
    assert record.read_runs(tmp_path / "runs.json", [run], {"patient": rows}) == []
    assert record.read_runs(tmp_path / "runs.json", [], {"patient": rows[::-1]}) == []
    assert "tested on other X-rays" in capsys.readouterr().out


def make_run(model, trial, right, curve, pictures=400, **settings):
    """A run that is right on the first `right` of 400 X-rays."""
    labels = np.arange(pictures) % 5
    return {
        "split": "patient",
        "model": model,
        "trial": trial,
        "labels": labels,
        "predicted": np.where(np.arange(pictures) < right, labels, (labels + 1) % 5),
        "patients": np.arange(pictures),
        "accuracy": list(map(float, curve)),
        "recipe": replace(RECIPE, model=model, seed=trial, **settings),
    }


CALM = np.array([0.5, 0.6, 0.7, 0.78, 0.80, 0.82, 0.83, 0.84])
WILD = np.array([0.2, 0.4, 0.5, 0.78, 0.60, 0.85, 0.55, 0.84])


def summary(runs):
    index = pd.DataFrame({"label": CLASSES, "split": "test", "patient": list("abcde"), "source": "kermany"})
    results = tables.summarise(runs, {"patient": index}, trials=3)
    results["costs"] = {"resnet34_ma": {"training_step_ratio": 1.05}}
    return results | {"verdicts": tables.verdicts(results)}


def judged(runs):
    return {v["claim"]: v["verdict"] for v in summary(runs)["verdicts"]}


def test_verdicts_follow_the_runs():
    trials = range(3)
    plain = [make_run("resnet34", t, 300, WILD) for t in trials]
    ma = [make_run("resnet34_ma", t, 330, CALM) for t in trials]
    cbam = [make_run("resnet34_cbam", t, 280, WILD) for t in trials]
    assert judged(plain + ma + cbam) == {
        "MA beats plain": "supported",
        "MA trains more stably than plain": "supported",
        "MA converges faster than CBAM": "supported",
        "CBAM does not beat plain": "supported",
        "MA costs little": "supported",
    }
    swapped = [make_run("resnet34", t, 330, CALM) for t in trials]
    swapped += [make_run("resnet34_ma", t, 300, WILD) for t in trials]
    swapped += [make_run("resnet34_cbam", t, 350, CALM) for t in trials]
    assert judged(swapped) == {
        "MA beats plain": "contradicted",
        "MA trains more stably than plain": "contradicted",
        "MA converges faster than CBAM": "contradicted",
        "CBAM does not beat plain": "contradicted",
        "MA costs little": "supported",
    }
    alike = [make_run(name, t, 300 + t, CALM) for t in trials for name in ("resnet34", "resnet34_ma", "resnet34_cbam")]
    assert judged(alike)["MA beats plain"] == "not supported here"
    assert judged(plain[:1])["MA beats plain"] == "not enough runs"


def test_fewer_than_three_trials_are_not_enough():
    two = [make_run(name, t, right, CALM) for t in range(2) for name, right in (("vgg16", 100), ("vgg16_ma", 390))]
    results = summary(two)
    assert results["splits"]["patient"]["models"]["vgg16_ma"]["minus_plain"]["low"] > 0.5
    assert {v["verdict"] for v in results["verdicts"][:4]} == {"not enough runs"}
    assert judged([*two, make_run("vgg16", 2, 100, CALM), make_run("vgg16_ma", 2, 390, CALM)])["MA beats plain"] == (
        "supported"
    )


@pytest.mark.parametrize("other", [{"epochs": 12}, {"lr": 0.1}, {"init": "eleven-epochs.safetensors"}, {"ema": 0.9}])
def test_networks_of_unequal_recipes_are_not_compared(other):
    """Whatever setting differs; those that do not decide the outcome may."""
    plain = [make_run("resnet34", t, 300, CALM) for t in range(3)]
    unequal = [make_run("resnet34_ma", t, 390, CALM, **other) for t in range(3)]
    results = summary(plain + unequal)
    assert results["splits"]["patient"]["models"]["resnet34_ma"]["minus_plain"] is None
    assert {v["verdict"] for v in results["verdicts"][:4]} == {"not enough runs"}
    assert len(results["recipes"]) == 2


def test_trials_of_several_recipes_are_not_pooled():
    """Two trials of one recipe and two of another make no three."""
    runs = [
        make_run(name, t, right, CALM, epochs=8 + t // 2)
        for t in range(4)
        for name, right in (("resnet34", 300), ("resnet34_ma", 390))
    ]
    results = summary(runs)
    assert results["splits"]["patient"]["models"]["resnet34_ma"]["minus_plain"]["trials"] == 2
    assert {v["verdict"] for v in results["verdicts"][:4]} == {"not enough runs"}


def test_trainings_that_only_prove_that_a_network_learns_get_no_verdict():
    trials = range(3)
    long = [make_run(name, t, right, CALM) for t in trials for name, right in (("resnet34", 300), ("resnet34_ma", 330))]
    short = [
        make_run(name, t, right, [0.5], epochs=1) for t in trials for name, right in (("vgg16", 350), ("vgg16_ma", 100))
    ]
    assert summary(long + short)["verdicts"][:4] == summary(long)["verdicts"][:4]
    assert summary(long + short)["splits"]["patient"]["models"]["vgg16_ma"]["minus_plain"]["value"] == -250 / 400
    assert judged(short)["MA beats plain"] == "not enough runs"


def test_differences_are_paired_by_trial_and_keep_their_counts():
    runs = [
        make_run("resnet34", 0, 300, CALM),
        make_run("resnet34_ma", 0, 320, CALM),
        make_run("resnet34_ma", 1, 0, CALM),
    ]
    m = summary(runs)["splits"]["patient"]["models"]["resnet34_ma"]
    assert m["minus_plain"]["value"] == pytest.approx(20 / 400) and m["minus_plain"]["trials"] == 1
    low, high = m["minus_plain"]["low"], m["minus_plain"]["high"]
    half = 1.96 * np.sqrt(0.05 * 0.95 / 400)
    assert low == pytest.approx(0.05 - half, abs=0.006) and high == pytest.approx(0.05 + half, abs=0.006)
    assert not m["complete"] and m["accuracy"] == {"0": 0.8, "1": 0.0}


def test_intervals_know_that_seeds_differ(rng):
    """Of two networks that are equally good but for the luck of the seed, three trials seldom tell one the better."""
    found = 0
    for _ in range(50):
        of, to = ([make_run("vgg16", t, int(rng.normal(75, 4)), CALM, 100) for t in range(3)] for _ in range(2))
        figure = tables.difference(tables.pairs_of(of, to))
        found += figure["low"] <= 0 <= figure["high"]
    assert found >= 44


def test_the_papers_ten_networks_are_ten_whatever_is_registered():
    assert len(paper.PAPERS_TEN) == 10 and set(paper.PAPERS_TEN) <= set(list_models())
    assert set(paper.PAPERS_TEN) == set(tables.PAPER_ACCURACY)


def test_the_recorded_epoch_of_equals_is_the_first():
    assert tables.epochs_to(np.array([0.1, 0.9, 0.5, 0.9]), 0.9) == 2
    equal = [make_run("resnet34", t, 300, CALM) for t in range(3)]
    assert summary(equal)["splits"]["patient"]["best"]["trial"] == 0


def test_measures_of_a_curve_by_hand():
    assert tables.fluctuation(np.array([0, 0, 0, 0.1, 0.3, 0.2])) == pytest.approx(np.std([0.2, -0.1]))
    assert np.isnan(tables.fluctuation(np.ones(5)))
    assert tables.epochs_to(np.array([0.1, 0.5, 0.4, 0.9]), 0.5) == 2
