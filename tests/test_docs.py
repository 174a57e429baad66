"""What the documents say is what the commands produced, and the commands they name exist."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from PIL import Image

from manet_core import create_classifier, explain, tasks
from manet_core.networks import registry
from manet_core.phantom import phantom
from manet_core.weights import read_manifest
from train import alexnet, benchmark, evaluate, evidence, sources, tables
from train.complexity import last_map
from train.measures.calibration import RIGHT
from train.measures.explainers import OTHER
from train.measures.markdown import number
from ui import benchmark as page_benchmark

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPERS, SPEED = ((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("papers", "speed"))
CARD = (ROOT / "weights" / "MODEL_CARD.md").read_text(encoding="utf-8")


def result(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_tables_are_drawn_from_the_results():
    figures = evaluate.tables(result("evaluation"))
    assert figures in README and figures in CARD
    assert benchmark.table(result("benchmark"), stages=False) in SPEED
    assert benchmark.table(result("benchmark")) in (ROOT / "results" / "benchmark.md").read_text(encoding="utf-8")
    headline = evidence.headline(result("evidence"))
    assert headline in README and headline in CARD


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("evidence.json")), ids=lambda path: path.parent.name)
def test_pages_of_every_set_of_weights_are_drawn_from_its_figures(path):
    for name, draw in (("evidence", evidence.markdown), ("evaluation", evaluate.tables)):
        figures = json.loads(path.with_name(f"{name}.json").read_text(encoding="utf-8"))
        assert path.with_name(f"{name}.md").read_text(encoding="utf-8") == draw(figures)


def test_the_files_of_the_readme_exist():
    table = README.split("| file | concept |")[1].split("\n\n")[0]
    folder = ROOT
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", table):
        if "/" in name:
            folder = ROOT / name if name.endswith("/") else (ROOT / name).parent
        assert (folder / name).exists() or (ROOT / name).exists(), name


def folded(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def external(run: dict) -> float:
    """Mean sensitivity to COVID-19, tuberculosis and adult normals of other hospitals."""
    groups = ("COVID-19", "tuberculosis", "adult normals")
    return sum(run["external"][group]["all"]["sensitivity"]["value"] for group in groups) / 3


def test_refitted_last_layers_gain_and_cost_what_the_documents_say(weights):
    card = folded((weights / "paper-composition.md").read_text(encoding="utf-8"))
    gains, costs = [], {}
    for name, model in result("paper-composition/evidence")["models"].items():
        if "as_trained" not in model:
            continue
        trained, layer = model["as_trained"], model["last_layer"]
        assert layer == read_manifest(weights / "paper-composition.json")[name].get("last_layer")
        assert bool(layer) == name.startswith("efficientnet_lite0"), "the three of ResNet-34 stay as trained"
        if layer:
            gains.append(100 * (external(model) - external(trained)))
            before, after = (100 * m["per_class"]["COVID-19"]["sensitivity"] for m in (trained, model["test"]))
            attention = {"ma": "MA", "cbam": "CBAM"}.get(name.rsplit("_", 1)[1], "plain")
            costs[attention] = f"{before:.0f} → {after:.0f} % ({attention})"
    assert "three of ResNet-34 stay as trained" in card
    assert f"rises by {min(gains):.0f} to {max(gains):.0f} points" in card
    assert "{plain}, {MA} and {CBAM}".format(**costs) in card


def test_the_readme_tells_the_segmenters_other_convention(weights):
    iou = read_manifest(weights)["resunet"]["figures"]["validation"]
    said = f"IoU on validation is {100 * iou['iou_shenzhen']:.1f} % and {100 * iou['iou_montgomery']:.1f} %"
    assert said in folded(README)


def test_the_card_tells_what_the_controls_are_worth():
    controls = result("evidence")["controls"]
    without, shown = (100 * controls[sees]["accuracy"]["value"] for sees in ("outside", "lungs"))
    assert f"reaches an accuracy of {without:.1f} % there, against {shown:.1f} % with the lungs shown" in folded(CARD)
    less = controls["outside"]["minus_lungs"]["external_groups"]
    worse, low, high = (-100 * less[bound] for bound in ("value", "high", "low"))
    assert f"{worse:.1f} points worse (mean over classes and sources, 95 % CI {low:.1f} to {high:.1f})" in folded(CARD)
    said = f"there it is {worse:.1f} points worse ({low:.1f} to {high:.1f}; mean over classes and sources)"
    assert said in folded(README)
    blind, seeing = (controls[sees]["external"]["tuberculosis"]["all"]["sensitivity"] for sees in ("outside", "lungs"))
    said = f"finds {blind['value']:.0%} of tuberculosis instead of {seeing['value']:.0%}".replace("%", " %")
    assert said in folded(CARD)


def test_the_paper_compositions_external_figures_are_those_of_its_evidence():
    models = result("paper-composition/evidence")["models"].values()

    def spread(group: str) -> str:
        values = [100 * model["external"][group]["all"]["sensitivity"]["value"] for model in models]
        return f"{min(values):.0f} to {max(values):.0f} %"

    assert f"find external COVID-19 ({spread('COVID-19')})" in folded(README)
    said = f"normal in {spread('adult normals')} and adult pneumonia in {spread('adult pneumonia')}"
    assert said in folded(README)


def test_the_papers_tables_are_drawn_from_the_results():
    results = result("paper/results")
    assert (ROOT / "results" / "paper" / "tables.md").read_text(encoding="utf-8") == tables.markdown(results)
    assert tables.claims(results) in PAPERS
    assert tables.verdicts(results) == results["verdicts"]


def between(figure: dict[str, float]) -> str:
    return "{:.1f} to {:.1f}".format(*(100 * figure[end] for end in ("low", "high")))


def test_what_is_said_of_a_last_layer_is_in_its_results():
    found = {
        composition: networks["efficientnet_lite0_last"]
        for composition, networks in result("alexnet/results")["compositions"].items()
    }
    shown, black = (found[composition]["one"]["accuracy"] for composition in ("one", "outside"))
    assert f"right on {100 * shown['value']:.1f} % ({between(shown)}) of the same test X-rays" in folded(PAPERS)
    said = f"with the lungs blacked out still on {100 * black['value']:.1f} % ({between(black)})"
    assert said in folded(PAPERS)
    several, external = found["several"]["several"], found["several"]["external"]
    assert f"right on {100 * several['accuracy']['value']:.1f} % where both classes come from several" in folded(PAPERS)
    assert f"finds {100 * external['sensitivity']['value']:.1f} % of the external COVID-19" in folded(PAPERS)
    normals = external["n"] - external["covid"]
    assert f"specificity of {100 * external['specificity']['value']:.1f} % on {normals} normals" in folded(PAPERS)


def test_what_is_said_of_guided_attention_is_in_its_results():
    rows = [row for row in result("guided/results") if (row["backbone"], row["stage"]) == ("efficientnet_lite0", "III")]
    unguided, guided = sorted(rows, key=lambda row: row["recipe"]["direct"])
    assert (unguided["recipe"]["alpha"], guided["recipe"]["alpha"]) == (0, 1)
    assert unguided["recipe"]["start"] == guided["recipe"]["start"] and unguided["epochs"] == guided["epochs"]
    assert f"the {guided['films']:,} training X-rays" in folded(PAPERS)
    accuracy, without = (row["test"]["accuracy"] for row in (guided, unguided))
    said = f"right on {100 * accuracy['value']:.1f} % ({between(accuracy)}), the same training without guidance on "
    assert f"{said}{100 * without['value']:.1f} % ({between(without)})" in folded(PAPERS)
    assert accuracy["low"] < without["value"] < accuracy["high"], "nothing to accuracy"
    inside, left = (
        [100 * row["attention"][what]["value"] for row in (guided, unguided)] for what in ("in_lung", "after")
    )
    assert "{:.1f} % lie in the lungs, without guidance {:.1f} %".format(*inside) in folded(PAPERS)
    assert "probability of {:.1f} % left, without guidance {:.1f} %".format(*left) in folded(PAPERS)
    (second,) = (
        row for row in result("guided/results") if (row["backbone"], row["stage"]) == ("efficientnet_lite0", "II")
    )
    said = "{:.0f} minutes in stage II and {:.0f} in stage III ({:.0f} without guidance)"
    assert said.format(*(row["minutes"] for row in (second, guided, unguided))) in folded(PAPERS)
    lesions = [row["lesions"]["enrichment"] for row in (guided, unguided)]
    told = ["{value:.2f} ({low:.2f} to {high:.2f})".format(**figure) for figure in lesions]
    assert f"lies {told[0]} times what chance would put there, without guidance {told[1]};" in folded(PAPERS)
    assert guided["lesions"]["enrichment_minus_other"]["low"] < 0 < guided["lesions"]["enrichment_minus_other"]["high"]


def test_what_is_said_of_the_shipped_guided_network_is_in_its_evidence():
    (found,) = result("guided/evidence")["models"].values()
    covid, normals = (found["external"][group]["all"] for group in ("COVID-19", "adult normals"))
    figure = covid["sensitivity"]
    assert f"finds {100 * figure['value']:.1f} % ({between(figure)}) of COVID-19" in folded(PAPERS)
    said = f"reads {normals['predicted']['COVID-19']} of {normals['n']} normals as COVID-19"
    assert said in folded(PAPERS) and said in folded(CARD)
    assert f"right on {100 * found['test']['accuracy']['value']:.1f} % of {found['test']['n']} test X-rays" in folded(
        CARD
    )


def test_what_is_said_of_training_end_to_end_is_in_its_results():
    gained = result("e2e/results")["differences"]
    accuracy, iou = gained["accuracy"], gained["iou"]
    said = f"no difference in accuracy can be seen: {100 * accuracy['value']:.1f} points ({between(accuracy)})"
    assert said in folded(PAPERS) and accuracy["low"] < 0 < accuracy["high"]
    less = {end: -iou[other] for end, other in (("low", "high"), ("high", "low"))}
    assert f"IoU falls by {-100 * iou['value']:.1f} points ({between(less)})" in folded(PAPERS)


def test_what_is_said_of_attentions_with_three_seeds_is_in_their_results():
    results = result("attention/results")
    arms, plain = results["arms"], results["arms"]["efficientnet_lite0"]
    assert all(len(arms[f"efficientnet_lite0{w}"]["seeds"]) == 3 for w in ("", "_ma", "_nma", "_cbam", "_outside"))
    assert (results["recipe"]["size"], results["recipe"]["epochs"]) == (128, 4)

    def less(which: str, figure: str) -> str:
        gap = arms[f"efficientnet_lite0_{which}"]["minus_first"][figure]
        return "{:.1f} ({:.1f} to {:.1f}".format(*(-100 * gap[end] for end in ("value", "high", "low")))

    for text in (PAPERS, README):
        value, bounds = less("nma", "accuracy").split(" (")
        assert f"{value} points less accurate than the plain network ({bounds})" in folded(text)
        assert less("ma", "accuracy") in folded(text) and less("cbam", "accuracy") in folded(text)
    for which in ("ma", "nma", "cbam"):
        for figure in ("test_groups", "external_groups"):
            gap = arms[f"efficientnet_lite0_{which}"]["minus_first"][figure]
            assert gap["low"] < 0 < gap["high"], "no difference can be told"
    blind = arms["efficientnet_lite0_outside"]["accuracy"]["value"]
    said = f"right on {100 * blind:.1f} % of the test X-rays, with them on {100 * plain['accuracy']['value']:.1f} %"
    assert said in folded(PAPERS)
    value, bounds = less("outside", "accuracy").split(" (")
    assert f"{value} points more ({bounds})" in folded(PAPERS)
    assert f"{value} points ({bounds}) more accurate on the test split" in folded(CARD)
    whole = arms["efficientnet_lite0_whole"]
    more, worse = whole["minus_first"]["accuracy"], less("whole", "external_groups").split(" (")
    points = f"{100 * more['value']:.1f} points"
    for text in (PAPERS, README):
        assert points in folded(text) and f"({between(more)}; one seed)" in folded(text) and whole["seeds"] == [0]
        assert f"{worse[0]} points worse" in folded(text) and f"({worse[1]}; mean over classes and sources)" in folded(
            text
        )
    assert f"it is {points} more accurate there and {worse[0]} worse on external X-rays" in folded(CARD)
    shape = arms["efficientnet_lite0_shape"]["accuracy"]
    assert f"alone allows {100 * shape['value']:.1f} % ({between(shape)})" in folded(PAPERS)
    value, bounds = less("outside", "test_groups").split(" (")
    assert f"it is {value} points ({bounds}) on test and {less('outside', 'external_groups')})" in folded(PAPERS)
    last = last_map(create_classifier("efficientnet_lite0_ma", 5), 128)
    assert f"its last map keeps {last:.3f}, at 224 pixels 0.36" in folded(PAPERS)


def test_what_is_said_of_agreement_is_in_the_evidence():
    found = result("evidence")["agreement"]["manet"]["external"]
    groups, wrong = found["groups"], found["claims"]["COVID-19"]
    agreed = groups["unanimous"]["n"] / groups["all"]["n"]
    right, divided = (groups[name]["accuracy"]["value"] for name in ("unanimous", "divided"))
    said = f"agreed on {agreed:.0%} of the external X-rays, and were then right in {right:.0%}".replace("%", " %")
    assert said in folded(CARD) and f"most of them were right in {divided:.0%}".replace("%", " %") in folded(CARD)
    for text in (README, CARD):
        assert f"{100 * wrong['wrongly']['value']:.1f} % ({between(wrong['wrongly'])})" in folded(text)
        assert f"right on {RIGHT:.0%} of validation X-rays".replace("%", " %") in folded(text)
    claimed = groups["claimed"]["accuracy"]
    share = f"{found['share_claimed']:.0%}".replace("%", " %")
    assert f"class is claimed for {share} and right in {100 * claimed['value']:.1f} % ({between(claimed)})" in folded(
        README
    )
    said = {name: f"{100 * groups[name]['accuracy']['value']:.1f} %" for name in ("unanimous", "unsure", "divided")}
    assert f"in {said['unanimous']}, where they agree without being sure enough in {said['unsure']}" in folded(README)
    assert f"most of them in {said['divided']}" in folded(README)
    at_home, right = result("evidence")["agreement"]["manet"]["test"], {}
    for name, place in (("external", groups), ("test", at_home["groups"])):
        right[name] = [f"{place[group]['accuracy']['value']:.0%}".replace("%", " %") for group in ("claimed", "unsure")]
    shares = share, f"{at_home['share_claimed']:.0%}".replace("%", " %")
    told = f"on {shares[0]} of the external X-rays (test split: {shares[1]}), right in {right['external'][0]}"
    assert f"{told} ({right['test'][0]})" in folded(CARD)
    assert f"they were right in {right['external'][1]} ({right['test'][1]})" in folded(CARD)


def test_alexnets_attention_is_told_beside_other_explainers():
    found, said = result("evidence")["explainers"], folded(PAPERS)
    located = result("covid/evidence")["localisation"]["models"]["alexnet_attn2"]
    chance = "its attention puts {} times on the lesions what chance would put there, Grad-CAM {} times"
    assert chance.format(*(number(located[name]["enrichment"], 2) for name in ("attention", "gradcam"))) in said
    assert f"On {located['attention']['n']} X-rays with lesions" in said and found["n"] == 12
    for name in ("attention", "gradcam"):
        gain = located[name]["enrichment_minus_other"]
        assert gain["low"] < 0 < gain["high"], "another patient's heatmaps lie there as much"
    network = found["models"]["AlexNet with attention"]
    left = {name: f"{of['deletion']['value']:.2f}" for name, of in network["explainers"].items()}
    assert sorted(left, key=left.get)[:2] == ["integratedgradients", "gradientshap"]
    told = f"falls to {left['integratedgradients']} and {left['gradientshap']}, with LIME to {left['lime']}, with its "
    assert f"{told}attention to {left['attention']}, with another X-ray's Grad-CAM to {left[OTHER]}" in said


def test_what_is_said_of_the_networks_mean_is_in_the_evidence():
    found = result("evidence")["ensemble"]["manet"]
    test, gain, abroad = (
        found["test"]["accuracy"],
        found["minus_best"]["accuracy"],
        found["minus_best"]["external_groups"],
    )
    each = [figures["accuracy"]["value"] for figures in found["each"].values()]
    assert len(each) == 4 and test["value"] > max(each)
    said = f"{100 * test['value']:.1f} % ({between(test)}) on the test split, {100 * gain['value']:.1f} points "
    assert f"than any of them**: {said}({between(gain)}) more than the network that was best" in folded(README)
    assert f"that network by {100 * abroad['value']:.1f} points ({between(abroad)};" in folded(README)
    here, plain = (f["external_groups"]["value"] for f in (found["figures"], found["each"]["efficientnet_lite0"]))
    other = result("paper-composition/evidence")["ensemble"]["manet"]["minus_best"]["accuracy"]
    worse = result("paper-composition/evidence")["ensemble"]["manet"]["minus_best"]["external_groups"]
    said = f"on external X-rays worse ({100 * worse['value']:.1f} points, {between(worse)})"
    assert f"the best of them ({100 * other['value']:.1f} points, {between(other)}), and {said}" in folded(README)
    assert here < plain and f"({100 * here:.1f} and {100 * plain:.1f} %;" in folded(README)


def test_the_readme_begins_with_what_to_expect_elsewhere():
    evidence = result("evidence")
    found = evidence["agreement"]["manet"]["external"]
    right = found["groups"]["claimed"]["accuracy"]["value"]
    said = f"a class is named for {found['share_claimed']:.0%} of the films, and rightly in {right:.0%} of these"
    assert said.replace("%", " %") in folded(README)
    claims, groups = found["claims"], found["groups"]
    named = f"(570), and most of the named classes are COVID-19 ({claims['COVID-19']['claimed']} of"
    assert f"On {groups['all']['n']} X-rays" in README and f"{named} {groups['claimed']['n']})" in folded(README)
    assert claims["COVID-19"]["n"] == 570 and not any(
        claims[f"{germ} pneumonia"].get("n") for germ in ("Bacterial", "Viral")
    )
    normal, missed = claims["Normal"], claims["Tuberculosis"]["found"]["value"]
    rightly = round(normal["claimed"] * normal["right"]["value"])
    for text in (README, CARD):
        assert f"was named for {normal['claimed']} films, of which {rightly} were labelled so" in folded(text)
    assert f"Tuberculosis was named for {missed:.0%} of".replace("%", " %") in folded(README)
    tuberculosis = [model["external"]["tuberculosis"]["all"]["sensitivity"] for model in evidence["models"].values()]
    low, high = (100 * end([figure["value"] for figure in tuberculosis]) for end in (min, max))
    assert f"single networks find {low:.0f} to {high:.0f} %" in folded(README)


def test_the_card_tells_of_its_data_and_failures_what_was_measured(weights):
    card, evidence = folded(CARD), result("evidence")
    (trained,) = {
        (sum(entry["training"]["pictures"].values()), entry["training"]["patients"])
        for name, entry in read_manifest(weights).items()
        if name != "resunet"
    }
    assert "trained on {:,} X-rays of {:,} patients".format(*trained) in card
    splits, pairs = evidence["splits"], evidence["splits"]["near_duplicates"]
    said = f"A search of all {splits['pictures']:,} pictures found {sum(pairs.values())} pairs of near-duplicates"
    assert said in card and f"{splits['of_another_label']} of these pairs have different labels" in card
    assert f"{pairs['test – train']} between training (or pretraining) and test" in card
    assert f"{pairs['train – val']} between training and validation" in card and splits["patients_crossing"] == 0
    adults, germs, missed = [], [], []
    for model in evidence["models"].values():
        test = model["groups"]["test"]
        adults.append(test["cohorts"]["adult pneumonia, all"])
        known = [g for g in test["groups"] if "l pneumonia" in g["label"] and g["source"] != "kermany"]
        germs.append((sum(g["n"] for g in known), sum(g["predicted"]["COVID-19"] for g in known)))
        found = model["external"]["tuberculosis"]["all"]
        missed.append(found["predicted"]["Normal"] / found["n"])
    (n,), ((of, _), *_) = {cohort["n"] for cohort in adults}, germs
    read = [cohort["read_as"]["value"] for cohort in adults]
    assert f"{100 * min(read):.0f} to {100 * max(read):.0f} % of {n} test X-rays are read as any pneumonia" in card
    covid = [count for _, count in germs]
    assert f"Of {of} with a known germ, {min(covid)} to {max(covid)} are read as COVID-19" in card
    assert f"{100 * min(missed):.0f} to {100 * max(missed):.0f} % read as Normal" in card


@pytest.mark.parametrize("page", [CARD, README, PAPERS], ids=["card", "readme", "papers"])
def test_no_command_exports_into_another_sets_files(page):
    """`train.export` refuses it."""
    assert not re.search("train.export (?!.*(?:--weights|[$]set))", page)


def test_the_readme_says_what_mask_attention_did_to_accuracy():
    found = {
        name: model["accuracy_minus_plain"]
        for name, model in result("evaluation")["classification"].items()
        if "accuracy_minus_plain" in model
    }
    less = {
        end: -found["efficientnet_lite0_ma"][other]
        for end, other in (("value", "value"), ("low", "high"), ("high", "low"))
    }
    assert f"it is {100 * less['value']:.1f} points (95 % CI {between(less)}) less accurate" in folded(README)
    others = [found[f"efficientnet_lite0_{attention}"] for attention in ("nma", "cbam")]
    assert all(figure["low"] < 0 < figure["high"] for figure in others)


def test_what_is_said_of_explainers_is_in_the_evidence():
    found = result("evidence")["explainers"]
    networks = [model["explainers"] for model in found["models"].values()]

    def span(explainer: str, measure: str) -> str:
        values = [network[explainer][measure]["value"] for network in networks]
        return f"{min(values):.2f} to {max(values):.2f}"

    ours, grad_cam = (span(name, "deletion") for name in ("integratedgradients", "gradcam"))
    said = f"(deletion {ours}; Grad-CAM {grad_cam}), and that is not the lesion"
    assert f"{said} (enrichment {span('integratedgradients', 'enrichment')})" in folded(README)
    assert f"`--explained {found['n']}`" in README


def test_what_is_said_of_calibration_is_in_the_evidence():
    models = [model["calibration"] for model in result("evidence")["models"].values()]
    errors = {split: sorted(model[split]["after"]["ece"] for model in models) for split in ("test", "external")}
    home, away = (f"{found[0]:.2f} to {found[-1]:.2f}" for found in errors.values())
    assert f"error on test {home}), too high elsewhere (external {away})" in folded(README)
    assert f"best network {errors['external'][0]:.3f}" in folded(CARD)
    raw = {split: sorted(model[split]["before"]["ece"] for model in models) for split in errors}
    test, external = (f"{found[0]:.2f} to {found[-1]:.2f}" for found in raw.values())
    assert f"uncalibrated {test})" in folded(CARD) and f"uncalibrated {external})" in folded(CARD)
    assert f"(ECE on test {home}" in folded(CARD) and f"(external ECE {away}" in folded(CARD)


def test_what_is_said_of_heatmaps_that_look_alike_is_in_the_manifest(weights):
    found = [
        value
        for entry in read_manifest(weights).values()
        for value in entry.get("heatmaps", {}).get("alike", {}).values()
    ]
    assert f"{min(found):.2f} to {max(found):.2f} by network and class" in folded(CARD)


def test_mask_attention_vanishes_in_small_pictures_as_the_readme_says():
    net = create_classifier("inception_v3_ma")
    kept = [last_map(net, size) for size in (299, 224, 80)]
    assert "last map keeps {:.2f} at 299 pixels, {:.2f} at 224 and {:.0e} at 80".format(*kept) in README


def test_the_pages_figures_are_drawn_from_the_results():
    assert page_benchmark.table(result("page")) in SPEED


@pytest.mark.parametrize("name", ["", "paper-composition", "nih14", "covid", "guided"])
def test_manifest_holds_the_same_figures_and_hashes(weights, name):
    results, entries = result(f"{name}/evaluation".strip("/")), read_manifest(weights / f"{name or 'manifest'}.json")
    assert entries["resunet"]["figures"]["test"] == results["segmentation"]
    classifiers = results["classification"] | results["findings"]
    assert entries.keys() - {"resunet"} == classifiers.keys()
    for name, figures in classifiers.items():
        assert entries[name]["figures"]["test"] == figures


@pytest.mark.parametrize("name", ["", "paper-composition"])
def test_temperatures_and_operating_points_are_those_of_the_evidence(weights, name):
    entries = read_manifest(weights / f"{name or 'manifest'}.json")
    for model, figures in result(f"{name}/evidence".strip("/"))["models"].items():
        for key in ("temperature", "operating_point"):
            assert entries[model].get(key) == figures["calibration"].get(key)


def test_model_card_names_every_network(weights):
    for name in read_manifest(weights):
        assert f"`{name}`" in CARD or f"`_{name.rsplit('_', 1)[1]}`" in CARD


def test_the_readmes_python_example_runs(tmp_path, monkeypatch, weights):
    example = re.search(r"### Python\n+```python\n(.*?)```", README, re.S)[1]
    Image.fromarray((phantom(256).pixels * 255).astype("uint8")).save(tmp_path / "chest.dcm", "PNG")
    (tmp_path / "weights").symlink_to(weights, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    assert names["a"].mask.shape == (256, 256)


def test_the_examples_of_extending_run(monkeypatch, weights):
    """Each from outside, in the order of the page; what they register is there for what uses the registries."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for module, name in ((registry, "_NETWORKS"), (explain, "_EXPLAINERS"), (tasks, "_TASKS"), (sources, "_SOURCES")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    monkeypatch.chdir(weights.parent)
    names = {"__name__": "example"}
    for example in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(example, names)
    image, mask = torch.rand(2, 1, 64, 64), torch.ones(2, 1, 64, 64)
    for model in ("small", "small_ma", "small_nma", "small_cbam"):
        net = create_classifier(model).eval()
        assert net(image, mask).shape == (2, 5)
        assert [m.shape[-1] for m in net.attention_maps(mask)] == [32, 16, 8] * model.endswith("ma")
    reading = names["analysis"].readings["efficientnet_lite0"]
    assert reading.native == (224, 224) and all(peak > 0 for peak in reading.peaks.values())
    assert tasks.get_task("infection").target("Viral pneumonia").tolist() == [0, 1]
    (film,) = sources.get_source("clinic").find([Path("covid/p1-2.png"), Path("covid/masks/p1-2.png")])
    assert (film.label, film.patient) == ("COVID-19", "p1")


def options(module: str, capsys, monkeypatch) -> set[str]:
    """All options of `python -m module` and of its verbs, if it has any."""
    verb = importlib.import_module(f"{module}.__main__" if module == "manet_core" else module)
    found, subverbs = set(), [[]]
    while subverbs:
        subverb = subverbs.pop()
        monkeypatch.setattr(sys, "argv", [module, *subverb, "--help"])
        with pytest.raises(SystemExit):
            verb.main()
        text = capsys.readouterr().out
        if not subverb and (verbs := re.search(r"^  \{([\w,]+)\}", text, re.M)):
            subverbs = [[name] for name in verbs[1].split(",")]
        found |= set(re.findall(r"--[a-z][\w-]*", text))
    return found


@pytest.mark.parametrize(
    "page", ["README.md", "weights/MODEL_CARD.md", "docs/papers.md", "docs/speed.md", "docs/extending.md"]
)
def test_commands_and_files_exist(page, capsys, monkeypatch):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for target in set(re.findall(r"make (\w+)", text)) & {"app", "test", "clean"}:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    known = set()
    for module in set(re.findall(r"(?:python|accelerate launch.*?) -m ((?:train|ui|manet_core)[\w.]*)", text)) | {
        "app"
    }:
        known |= options(module, capsys, monkeypatch)
    if "accelerate launch" in text:
        known |= {option for action in launch_command_parser()._actions for option in action.option_strings}
    known |= {"--require-hashes"}  # pip's
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) <= known


def test_alexnets_tables_are_drawn_from_the_results():
    results = result("alexnet/results")
    assert (ROOT / "results" / "alexnet" / "tables.md").read_text(encoding="utf-8") == alexnet.markdown(results)
    attended, pairs = results["compositions"]["one"]["alexnet_attn2"], results["pairs"]["one"]
    one, several = (attended[place]["accuracy"] for place in ("one", "several"))
    assert f"right on {100 * one['value']:.1f} % ({between(one)};" in folded(PAPERS)
    for text, said in ((PAPERS, "the first finds {:.1f} %"), (CARD, "it finds {:.0f} % of COVID-19")):
        assert said.format(100 * attended["external"]["sensitivity"]["value"]) in folded(text)
    plain = results["compositions"]["one"]["alexnet"]
    accuracy = plain["one"]["accuracy"]
    assert f"is right on {100 * accuracy['value']:.1f} % ({between(accuracy)}; one trial of" in folded(PAPERS)
    blind = results["compositions"]["outside"]["alexnet_attn2"]
    without, normal = blind["one"]["accuracy"], 1 - blind["one"]["covid"] / blind["one"]["n"]
    said = f"is still right on {100 * without['value']:.1f} % ({between(without)}; one trial of {blind['epochs'][0]}"
    assert said in folded(PAPERS) and f"of which {100 * normal:.1f} % are normal" in folded(PAPERS)
    assert plain["trials"] == 1 and plain["epochs"] == [60] and set(attended["epochs"]) == {60}
    gains = [pairs[f"alexnet_attn{n} - alexnet"] for n in (2, 1, 3)]
    said = [f"{100 * gain['value']:.1f}{' points' * (not k)} ({between(gain)})" for k, gain in enumerate(gains)]
    assert "differs from it by {}, after convolution 4 by {}, after three by {}".format(*said) in folded(PAPERS)
    better, four, three = (
        pairs["alexnet_attn2 - alexnet_attn1"],
        *(results["compositions"]["one"][f"alexnet_attn{n}"]["several"]["accuracy"]["value"] for n in (1, 3)),
    )
    said = f"two trials do not tell: by {100 * better['value']:.1f} points ({between(better)}, patients and trials"
    assert said in folded(PAPERS) and better["trials"] == 2 and better["low"] < 0 < better["high"]
    without = 100 * plain["several"]["accuracy"]["value"]
    said = f"is right on {100 * several['value']:.1f} %, after convolution 4 on {100 * four:.1f} %, after three on "
    said += f"{100 * three:.1f} %, AlexNet without attention on {without:.1f} %"
    without = f"AlexNet without attention {100 * plain['external']['sensitivity']['value']:.1f} %"
    assert said in folded(PAPERS) and without in folded(PAPERS)
