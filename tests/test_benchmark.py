"""The benchmark runs, counts what it says, and its committed figures keep what the project promises."""

import json
import shutil
import time

import pytest
from conftest import ROOT

from train import benchmark
from ui import benchmark as page_benchmark


def test_paired_times_tell_a_slow_function_from_a_fast_one():
    figure = benchmark.paired(lambda: time.sleep(0.02), lambda: time.sleep(0.01), runs=5, name="sleep")
    assert figure["ratio"] == pytest.approx(2, rel=0.25)
    assert figure["a_ms"] == pytest.approx(20, rel=0.25) and figure["b_ms"] == pytest.approx(10, rel=0.25)


def test_the_benchmark_runs_on_random_classifiers(random_weights):
    results = benchmark.benchmark_pipeline(random_weights, "efficientnet_lite0", runs=2)
    results |= benchmark.benchmark_mask_attention("efficientnet_lite0", runs=2, size=64)
    assert len(results) == 4 and all(figure["ratio"] > 0 for figure in results.values())
    library = next(figure for name, figure in results.items() if "pytorch-grad-cam" in name)
    assert library["ratio"] > 2, "class by class on the whole network is much slower than through the head"


def test_committed_figures_keep_the_promises():
    results = json.loads((ROOT / "results" / "benchmark.json").read_text())
    ratio = {name: figure["ratio"] for name, figure in results.items() if isinstance(figure, dict)}
    assert ratio["resnet34 trio: analysis with 15 heatmaps (a) over bare forward passes (b)"] <= 1.25
    assert ratio["resnet34 trio: pytorch-grad-cam class by class (a) over our analysis (b)"] >= 8
    assert ratio["resnet34: inference, MA (a) over plain (b)"] <= 1.05
    assert ratio["resnet34: training step, MA (a) over plain (b)"] <= 1.10
    assert ratio["resnet34: training step of 32 on a fixed batch (a) over one of the whole loop (b)"] >= 0.85


def test_the_page_benchmark_runs(random_weights, run, tmp_path):
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if shutil.which("chromium") is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    few = ["--starts", 1, "--drops", 1, "--users", 2, "--seconds", 3, "--files", 3]
    run(page_benchmark, "--weights", random_weights, *few, "--out", tmp_path)
    results = json.loads((tmp_path / "page.json").read_text())
    assert results["answers"] >= 2 and results["wrong or mixed-up answers"] == 0
    assert results["of them read"] == results["X-rays in the archive"] == 3
    assert (
        0
        < results["3 networks: another class, median, s"]
        < results["3 networks: first drop, at once after the start, s"]
    )
    assert results["start of the server to the page, median, s"] > 1 and "| answers |" in page_benchmark.table(results)
