"""What the documents say is what the commands produced, and the commands they name exist."""

import importlib.util
import json
import re

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

from manet_core import create_classifier
from manet_core.weights import read_manifest
from train import benchmark, evaluate, evidence, tables
from train.complexity import last_map
from ui import benchmark as page_benchmark

README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "weights" / "MODEL_CARD.md").read_text(encoding="utf-8")


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_tables_are_drawn_from_the_results():
    figures = evaluate.tables(result("evaluation"))
    assert figures in README and figures in CARD
    assert (ROOT / "results" / "evaluation.md").read_text(encoding="utf-8") == figures
    assert benchmark.table(result("benchmark")) in README
    headline = evidence.headline(result("evidence"))
    assert headline in README and headline in CARD
    assert (ROOT / "results" / "evidence.md").read_text(encoding="utf-8") == evidence.markdown(result("evidence"))


def carried(run: dict) -> float:
    """Mean share of other hospitals' COVID-19, tuberculosis and adult normals that is called right."""
    groups = ("COVID-19", "tuberculosis", "adult normals")
    return sum(run["external"][group]["all"]["right"]["value"] for group in groups) / 3


def test_no_recipe_carries_further_than_the_papers_as_the_readme_says():
    mean = {name: carried(run) for name, run in result("evidence")["recipes"].items()}
    reference = mean.pop("paper")
    assert len(mean) == 5 and max(mean.values()) < reference
    assert "Five\nrecipes tried to break that" in README and "none carries further than the paper's" in README


def test_the_last_layer_carries_as_much_further_as_the_readme_says(weights):
    gains, costs = [], []
    for name, model in result("evidence")["models"].items():
        trained, layer = model["as_trained"], model["last_layer"]
        assert layer == read_manifest(weights)[name].get("last_layer")
        assert bool(layer) == name.startswith("efficientnet_lite0")
        if layer:
            gains.append(100 * (carried(model) - carried(trained)))
            costs.append(100 * (trained["accuracy"]["value"] - model["test"]["accuracy"]["value"]))
        else:
            assert carried(model) == carried(trained)
    said = f"rises by {min(gains):.0f} to {max(gains):.0f} points, for at most {max(costs):.1f} points of accuracy"
    assert said in re.sub(r"\s+", " ", README)


def test_adults_of_other_hospitals_are_called_what_the_readme_says():
    assert "about half or more of adults with healthy\nlungs and most with pneumonia are called COVID-19" in README
    for model in result("evidence")["models"].values():
        for group, least in (("adult normals", 0.49), ("adult pneumonia", 0.6)):
            figures = model["external"][group]["all"]
            assert figures["called"]["COVID-19"] > least * figures["n"]


def test_noise_takes_what_the_model_card_says():
    assert "takes more than half of its accuracy from every EfficientNet-Lite0" in CARD
    for name, noisy in result("evidence")["disturbances"]["changes"]["Gaussian noise, σ = 0.05"].items():
        calm = noisy["value"] - noisy["minus none"]["value"]
        assert (noisy["value"] < calm / 2) == name.startswith("efficientnet_lite0")


def test_the_papers_tables_are_drawn_from_the_results():
    results = result("paper/results")
    assert (ROOT / "results" / "paper" / "tables.md").read_text(encoding="utf-8") == tables.markdown(results)
    assert tables.claims(results) in README
    assert tables.verdicts(results) == results["verdicts"]


def test_the_readme_tells_how_far_small_pictures_fade_mask_attention():
    net = create_classifier("inception_v3_ma")
    kept = [last_map(net, size) for size in (299, 224, 80)]
    assert "last map keeps {:.2f} at 299 pixels, {:.2f} at 224 and {:.0e} at 80".format(*kept) in README


def test_the_pages_figures_keep_the_promises():
    """A trio: median and 95th percentile from drop to heatmaps; many users at once; an archive; another class."""
    page = result("page")
    assert page_benchmark.table(page) in README
    assert page["3 networks: drop to last heatmap, median, s"] <= 2
    assert page["3 networks: drop to last heatmap, 95th percentile, s"] <= 4
    assert page["3 networks: another class, median, s"] <= 0.15
    assert page["start of the server to the page, median, s"] <= 8
    assert page["users at once"] == 8 and page["answers"] > 0 and page["wrong or mixed-up answers"] == 0
    assert page["memory after, MiB"] < 1.1 * page["memory before, MiB"]
    assert page["of them read"] == page["X-rays in the archive"] == 500 and page["most memory, MiB"] < 2048


def test_manifest_holds_the_same_figures_and_hashes(weights):
    results, entries = result("evaluation"), read_manifest(weights)
    assert entries["resunet"]["figures"]["test"] == results["segmentation"]
    assert entries.keys() - {"resunet"} == results["classification"].keys()
    for name, figures in results["classification"].items():
        assert entries[name]["figures"]["test"] == figures


def test_temperatures_are_those_of_the_evidence(weights):
    entries = read_manifest(weights)
    for name, figures in result("evidence")["models"].items():
        assert entries[name]["temperature"] == figures["calibration"]["temperature"]


def test_model_card_names_every_network(weights):
    for name in read_manifest(weights):
        assert f"`{name}`" in CARD or f"`_{name.rsplit('_', 1)[1]}`" in CARD


@pytest.mark.parametrize("text", [README, CARD], ids=["README", "MODEL_CARD"])
def test_commands_and_files_exist(text):
    for module in set(re.findall(r"python -m ((?:train|ui|manet_core)[\w.]*)", text)):
        assert importlib.util.find_spec(module), module
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists() or (ROOT / "weights" / link).exists(), link
    for target in set(re.findall(r"make (\w+)", text)) & {"app", "test", "clean"}:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    launch = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for flag in set(re.findall(r"(?<=\s)--[a-z][\w-]+", text)) - (launch if "accelerate launch" in text else set()):
        sources = [
            *ROOT.glob("train/*.py"),
            ROOT / "ui" / "benchmark.py",
            *ROOT.glob("manet_core/__main__.py"),
            ROOT / "app.py",
        ]
        assert any(f'"{flag}"' in path.read_text(encoding="utf-8") for path in sources), flag
