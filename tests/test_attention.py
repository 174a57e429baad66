"""Attentions and controls by one recipe: the comparison, seed by seed, and the verb that trains them."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from manet_core.tasks import MANET
from train import attention
from train.measures.study import Readings


def said(answers: np.ndarray) -> Readings:
    """What a network says of 40 test X-rays, of which every second one is normal and the others show COVID-19."""
    label = np.array(["Normal", "COVID-19"] * 20)
    index = pd.DataFrame(
        {"label": label, "source": "kermany", "patient": np.arange(40).astype(str), "split": "test", "findings": ""}
    )
    return Readings(MANET, index, np.eye(5, dtype=np.float32)[answers], np.zeros((40, 1), np.float32))


def test_arms_are_compared_with_the_plain_network_of_the_same_seed():
    truth = np.array([0, 1] * 20)
    half, none = np.where(np.arange(40) < 20, truth, 2), np.full(40, 2)
    found = attention.compare(
        {
            "plain": {0: said(truth), 1: said(half), 2: said(none)},
            "ma": {0: said(truth), 1: said(none)},
            "alone": {7: said(truth)},
        }
    )
    plain, ma = found["plain"], found["ma"]
    assert (plain["seeds"], ma["seeds"], plain["n"], plain["external"]) == ([0, 1, 2], [0, 1], 40, 0)
    assert plain["accuracy"]["value"] == pytest.approx(0.5) and ma["accuracy"]["value"] == pytest.approx(0.5)
    gap = ma["minus_first"]["accuracy"]
    assert gap["value"] == pytest.approx(-0.25), "seeds 0 and 1 alone: (1 − 1 + 0 − 0.5) / 2, not 0.5 − 0.5"
    assert gap["low"] < -0.25 < gap["high"]
    assert "minus_first" not in plain and "minus_first" not in found["alone"], "no seed in common"


def test_all_arms_are_trained_once_and_reported(run, phantoms, random_weights, tmp_path, monkeypatch, capsys):
    out, record = tmp_path / "out", tmp_path / "results" / "attention"
    common = ["--data", phantoms, "--weights", random_weights, "--cache", tmp_path / "cache", "--out", out]
    tiny = ["--size", 32, "--working", 64, "--batch", 8, "--epochs", 1, "--device", "cpu", "--precision", "no"]
    command = [attention, *common, *tiny, "--trials", 1, "--record", record]
    run(*command)
    names = attention.arms("efficientnet_lite0")
    assert sorted(path.parent.parent.name for path in out.glob("*/0/result.json")) == sorted(names)
    for arm, (network, sees) in names.items():
        settings = json.loads((out / arm / "0" / "settings.json").read_text(encoding="utf-8"))
        assert (settings["model"], settings["sees"], settings["seed"]) == (network, sees, 0)
    results = json.loads((record / "results.json").read_text(encoding="utf-8"))
    assert list(results["arms"]) == list(names) and results["recipe"]["size"] == 32
    assert (record / "tables.md").read_text(encoding="utf-8") == attention.markdown(results) in capsys.readouterr().out

    def again(*args):
        raise AssertionError("what is finished is not trained again")

    monkeypatch.setattr(attention.classify, "train", again)
    run(*command)
    for arm in list(names)[-2:]:
        (out / arm / "0" / "result.json").unlink()
    run(*command, "--trials", 3, "--report")
    results = json.loads((record / "results.json").read_text(encoding="utf-8"))
    assert list(results["arms"]) == list(names)[:-2], "those that are finished"
    with pytest.raises(SystemExit, match="No finished efficientnet_lite0 below"):
        run(attention, *common[:-1], tmp_path / "none", *tiny, "--report")
    with pytest.raises(SystemExit, match="another lr: choose another --out"):
        run(*command, "--lr", 0.5)
    with pytest.raises(SystemExit, match="1 or more"):
        run(*command, "--trials", 0)


def test_the_recorded_tables_are_drawn_from_their_results():
    folder = ROOT / "results" / "attention"
    drawn = attention.markdown(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    assert (folder / "tables.md").read_text(encoding="utf-8") == drawn
    assert drawn in (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
