"""The benchmark runs and counts what it says."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import behind_shipped_segmenter

from train import benchmark
from train.measures import speed
from train.recipe import Recipe, Run
from ui import benchmark as page_benchmark


def test_paired_times_tell_a_slow_function_from_a_fast_one(monkeypatch):
    """On a clock that only the two functions move, and that runs slower and slower."""
    now, slower = 0.0, 1.0

    def work(seconds):
        nonlocal now, slower
        now += seconds * slower
        slower *= 1.01

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    figure = benchmark.paired(lambda: work(0.02), lambda: work(0.01), runs=6, name="work")
    assert figure["ratio"] == pytest.approx(2, rel=0.011)
    assert figure["a_ms"] == pytest.approx(2 * figure["b_ms"], rel=0.011) and figure["b_ms"] > 10


def test_the_benchmark_runs_on_random_classifiers(random_weights):
    results = benchmark.benchmark_pipeline(random_weights, "efficientnet_lite0", runs=1)
    results |= benchmark.benchmark_mask_attention("efficientnet_lite0", runs=1, size=64)
    assert len(results) == 4 and all(figure["ratio"] > 0 for figure in results.values())
    table = benchmark.table(results | {"device": "CPU", "processor": "x", "instructions": "y", "torch": "2"})
    assert all(f"| {name} |" in table for name in results)


def test_films_are_measured_stage_by_stage_and_together(random_weights):
    figures = speed.stages(random_weights, 80, 1) | speed.runtimes(random_weights, benchmark.paired, 1)
    figures |= speed.many(random_weights, benchmark.paired, films=2, rounds=1, sides=(80,))
    assert all(figure.get("value", figure.get("ratio")) > 0 for figure in figures.values())
    for part in ("80×80 pixels: decode", "efficientnet_lite0_ma: pyramid alone", "resunet: PyTorch (a) over ONNX"):
        assert any(part in name for name in figures)
    assert len([name for name in figures if "analyze_many" in name]) == 4
    figures |= {"device": "CPU", "processor": "x", "instructions": "y", "torch": "2"}
    whole, short = benchmark.table(figures), benchmark.table(figures, stages=False)
    for name in figures.keys() - {"device", "processor", "instructions", "torch"}:
        assert f"| {name}" in whole and (f"| {name}" in short) == ("pixels: " not in name)


def test_a_film_costs_time_and_memory(random_weights):
    kept = np.ones(400_000_000, np.uint8)  # of this process, and none of that which is measured
    figure = speed.per_film(str(random_weights), count=2, side=80, networks=4, cores=1)
    assert figure["value"] > 0 and 0.1 < figure["memory"] < speed.memory() - kept.nbytes / 2e9


def test_engines_are_compared_by_what_their_summaries_say(monkeypatch):
    """Real Ray is started by the archive's own test."""

    def batch(command, **_):
        out, engine = (command[command.index(option) + 1] for option in ("--out", "--engine"))
        seconds = {"local": 3.0, "ray": 4.0}[engine]
        (out / "summary.json").write_text(json.dumps({"read": 4, "seconds": seconds}), encoding="utf-8")

    monkeypatch.setattr(speed, "find_spec", lambda name: name)
    monkeypatch.setattr(speed.subprocess, "run", batch)
    ((name, figure),) = speed.engines("weights", films=4).items()
    assert name.startswith("4 films") and figure == {"a_ms": 750, "b_ms": 1000, "ratio": 0.75}


def test_the_training_loop_is_measured_by_its_recipe(phantoms, random_weights, tmp_path):
    recipe = Recipe(model="efficientnet_lite0", size=64, batch=4)
    run = Run(phantoms, cache=tmp_path, weights=random_weights, device="cpu")
    ((name, figure),) = benchmark.benchmark_training(recipe, run, steps=1, rounds=1).items()
    assert name == "efficientnet_lite0: training step of 4 on a fixed batch (a) over one of the whole loop (b)"
    assert figure["ratio"] > 0


def test_the_page_benchmark_runs(random_weights, weights, tmp_path, monkeypatch):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if shutil.which("chromium") is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    few = ["--starts", 1, "--drops", 1, "--side", 300, "--users", 2, "--seconds", 3, "--files", 3]
    (tmp_path / "weights").mkdir()
    mixed = behind_shipped_segmenter(random_weights, weights, tmp_path / "weights")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--weights", str(mixed), *map(str, few), "--out", str(tmp_path)])
    drawn = page_benchmark.png
    monkeypatch.setattr(page_benchmark, "png", lambda size, seed: drawn(min(size, 512), seed))  # in place of 2000
    with ThreadPoolExecutor(1) as pool:  # a browser of its own beside that of other tests
        pool.submit(page_benchmark.main).result()
    results = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert results["answers"] >= 2 and results["wrong or mixed-up answers"] == 0
    assert results["of them read"] == results["X-rays in the archive"] == 3
    assert (
        0
        < results["3 networks: another class, median, s"]
        < results["3 networks: first drop, at once after the start, s"]
    )
    assert (
        0
        < results["film of 300×300: drop to film, median, s"]
        < results["film of 300×300: drop to last heatmap, median, s"]
    )
    assert results["film of 300×300: frames a second of zoom (processor)"] > 1
    assert results["start of the server to the page, median, s"] > 1 and "| answers |" in page_benchmark.table(results)
