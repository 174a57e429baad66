"""The whole path, on the phantom with random weights and on real X-rays with the shipped ones."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from manet_core import CLASSES, Pipeline, WeightsError, XRay, XRayError, load_xray, pipeline, to_frame
from manet_core.ahead import AHEAD
from manet_core.lungs import Lungs
from manet_core.networks import runtime
from manet_core.networks.runtime import runtime_of
from manet_core.phantom import phantom, phantom_mask
from manet_core.preprocess import View, crop, lung_box, resize, segmented_lungs, to_unit_range
from manet_core.tasks import get_task

TRIO = ["efficientnet_lite0", "efficientnet_lite0_ma", "efficientnet_lite0_cbam"]


@pytest.fixture(scope="module")
def random_pipe(random_weights):
    return Pipeline.load(random_weights)


@pytest.fixture(scope="module")
def task_pipe(many_tasks):
    return Pipeline.load(many_tasks)


@pytest.fixture(scope="module")
def pipe(weights):
    return Pipeline.load(weights)


def as_xray(picture: np.ndarray) -> XRay:
    picture = picture.astype(np.float32)
    return XRay((picture - picture.min()) / max(np.ptp(picture), 1))


def test_analysis_is_complete(random_pipe):
    x = XRay(phantom(512).pixels[:, :400])
    analysis = random_pipe.analyze(x)
    assert random_pipe.models == TRIO == list(analysis.readings)
    assert (
        analysis.original.shape == analysis.mask_raw.shape == analysis.mask.shape == analysis.lungs.shape == (512, 400)
    )
    assert analysis.original.dtype == analysis.lungs.dtype == np.float32
    assert analysis.mask_raw.dtype == analysis.mask.dtype == bool
    np.testing.assert_array_equal(analysis.lungs, analysis.original * analysis.mask)
    for name, reading in analysis.readings.items():
        assert tuple(reading.probabilities) == CLASSES
        assert sum(reading.probabilities.values()) == pytest.approx(1, abs=1e-6)
        assert reading.predicted == max(reading.probabilities, key=reading.probabilities.get)
        assert set(reading.heatmaps) == set(reading.peaks) == set(reading.in_lung) == set(CLASSES)
        inside = analysis.segmentation.at(64)
        for c in CLASSES:
            heatmap = reading.heatmaps[c]
            assert heatmap.shape == (64, 64) and heatmap.dtype == np.float32
            assert 0 <= heatmap.min() and heatmap.max() <= 1 + 1e-6
            assert (reading.peaks[c] == 0) == (heatmap.max() == 0)
            share = heatmap[inside].sum() / max(heatmap.sum(), 1e-7)
            assert reading.in_lung[c] == pytest.approx(share, abs=1e-5)
        full = analysis.heatmap(name, "Tuberculosis")
        assert full.shape == (512, 400) and 0 <= full.min() and full.max() <= 1 + 1e-6


def test_to_dict_is_json_and_holds_no_pixels(random_pipe):
    result = json.loads(json.dumps(random_pipe.analyze(phantom(128)).to_dict()))
    assert {"readings", "lung_area", "warnings"} <= result.keys()
    assert result["readings"]["efficientnet_lite0_ma"].keys() == {
        "task",
        "probabilities",
        "predicted",
        "operating_point",
        "in_lung",
    }
    assert len(json.dumps(result)) < 5000


def test_models_can_be_chosen(random_pipe):
    assert list(random_pipe.analyze(phantom(128), models=["efficientnet_lite0_ma"]).readings) == [
        "efficientnet_lite0_ma"
    ]
    mask_only = random_pipe.analyze(phantom(128), models=[])
    assert mask_only.readings == {} and mask_only.mask.shape == (128, 128)
    with pytest.raises(WeightsError, match="not loaded"):
        random_pipe.analyze(phantom(128), models=["resnet50"])


def test_same_x_ray_same_answer(random_pipe):
    a, b = (random_pipe.analyze(phantom(128)).to_dict() for _ in range(2))
    assert a == b


def test_the_mask_is_segmented_once_and_each_network_runs_once(random_pipe):
    calls = {}
    nets = {"segmenter": random_pipe.segmenter.head, **{n: net.conv_stem for n, net in random_pipe.classifiers.items()}}
    handles = [m.register_forward_hook(lambda *_, n=n: calls.update({n: calls.get(n, 0) + 1})) for n, m in nets.items()]
    random_pipe.analyze(phantom(128))
    for handle in handles:
        handle.remove()
    assert calls == dict.fromkeys(nets, 1)


def test_each_network_answers_its_own_task_and_votes_are_within_one(task_pipe):
    analysis = task_pipe.analyze(phantom(128))
    assert analysis.tasks == ["manet", "guided", "nih14"]
    for reading in analysis.readings.values():
        task, p = get_task(reading.task), reading.probabilities
        assert tuple(p) == tuple(reading.heatmaps) == tuple(reading.in_lung) == task.classes
        assert reading.predicted == max(p, key=p.get)
        assert (abs(sum(p.values()) - 1) < 1e-6) == task.exclusive
        assert reading.present == ([reading.predicted] if task.exclusive else [c for c in p if p[c] >= 0.5])
    assert list(analysis.readings_of("manet")) == ["efficientnet_lite0", "resnet34_ma"]
    assert sum(analysis.votes_of("manet").values()) == 2 and sum(analysis.votes_of("guided").values()) == 1
    assert analysis.votes == analysis.votes_of("manet") and analysis.leading == analysis.leading_of("manet")
    findings = analysis.readings["efficientnet_lite0_cbam"]
    assert 1 < len(findings.present) < 14 and analysis.leading_of("nih14") == findings.present
    two = [r.probabilities for r in analysis.readings_of("manet").values()]
    mean = {name: (two[0][name] + two[1][name]) / 2 for name in two[0]}
    assert two[0] != two[1] and analysis.mean_of("manet") == pytest.approx(mean)
    assert analysis.mean_of("guided") == next(iter(analysis.readings_of("guided").values())).probabilities
    assert analysis.mean_of("covid") == {}, "no network of it was asked"
    result = json.loads(json.dumps(analysis.to_dict()))
    assert result["means"] == {task: analysis.mean_of(task) for task in analysis.tasks}
    assert {m: r["task"] for m, r in result["readings"].items()} == {m: r.task for m, r in analysis.readings.items()}


def test_all_networks_claim_what_they_agree_on(task_pipe):
    analysis = task_pipe.analyze(phantom(128), lungs=Lungs(phantom_mask(64).astype(np.float32), phantom_mask(64)))
    (first, second), (alone,) = (list(analysis.readings_of(task)) for task in ("manet", "guided"))
    findings = analysis.readings["efficientnet_lite0_cbam"].present
    for name, claim in (("Tuberculosis", ["Tuberculosis"]), ("Normal", None)):
        readings = analysis.readings | {first: replace(analysis.readings[first], predicted="Tuberculosis")}
        readings[second] = replace(analysis.readings[second], predicted=name)
        asked = replace(analysis, readings=readings)
        assert asked.divided_of("manet") == (claim is None) and not asked.divided_of("nih14")
        assert asked.claim_of("manet") == asked.to_dict()["claims"]["manet"] == claim
        assert asked.claim_of("guided") == [readings[alone].predicted] and asked.claim_of("nih14") == findings
        table = to_frame([asked])
        assert list(table.claim[table.task == "manet"]) == [claim[0] if claim else "no reliable reading"] * 2
        assert table.predicted[0] == "Tuberculosis", "what a network says of itself"
        unsure = replace(asked, readings=readings | {first: replace(readings[first], operating_point=1.0)})
        assert unsure.unsure_of("manet") == (claim is not None) and unsure.claim_of("manet") is None
        assert not unsure.unsure_of("nih14") and unsure.claim_of("nih14") == findings
        withheld = replace(asked, withheld=["Why."])
        assert withheld.claim_of("nih14") is None and set(withheld.to_dict()["claims"].values()) == {None}


def test_without_a_finding_nothing_leads(task_pipe, monkeypatch):
    net = task_pipe.classifiers["efficientnet_lite0_cbam"]
    monkeypatch.setattr(net.classifier.bias, "data", torch.full((14,), -20.0))
    analysis = task_pipe.analyze(phantom(128), ["efficientnet_lite0_cbam"])
    reading = analysis.readings["efficientnet_lite0_cbam"]
    assert max(reading.probabilities.values()) < 1e-6 and reading.predicted in reading.probabilities
    assert reading.present == analysis.leading == [] and analysis.votes == {}


def test_a_network_of_the_lungs_box_sees_it_alone_and_its_heatmap_lies_where_the_box_is(task_pipe, monkeypatch):
    truth = phantom_mask(96)
    truth[:, 60:] = False  # one lung: the box is far from the whole
    lungs, x = Lungs(truth.astype(np.float32), truth), XRay(phantom(300).pixels[:, :240])
    net, seen = task_pipe.classifiers["resnet34_ma"], []
    monkeypatch.setattr(
        net, "forward_features", lambda *inputs: seen.extend(inputs) or type(net).forward_features(net, *inputs)
    )
    analysis = task_pipe.analyze(x, lungs=lungs)
    reading, (image, mask) = analysis.readings["resnet34_ma"], (t[0, 0].numpy() for t in seen)
    assert reading.box == lung_box(truth, 0.05) and reading.box[3] - reading.box[1] < 0.6
    np.testing.assert_array_equal(mask, crop(truth.astype(np.float32), reading.box, 64) > 0.5)
    expected = segmented_lungs(crop(resize(x.pixels, 96), reading.box, 64), mask)
    np.testing.assert_allclose(image, expected, atol=1e-6)
    top, left, bottom, right = np.rint(np.multiply(reading.box, (300, 240, 300, 240))).astype(int)
    for name in CLASSES:
        heatmap, full = reading.heatmaps[name], analysis.heatmap("resnet34_ma", name)
        assert heatmap.shape == (64, 64) and full.shape == (300, 240)
        np.testing.assert_allclose(full[top:bottom, left:right], resize(heatmap, (bottom - top, right - left)))
        assert full.sum() == pytest.approx(full[top:bottom, left:right].sum())
        share = heatmap[mask > 0].sum() / max(heatmap.sum(), 1e-7)
        assert reading.in_lung[name] == pytest.approx(share, abs=1e-5)
        assert sum(reading.in_sides[name]) == pytest.approx(share, abs=1e-5)
        assert reading.in_sides[name][1] == 0, "the cut between the lungs is that of the whole mask"
    assert any(heatmap.any() for heatmap in reading.heatmaps.values())
    assert analysis.readings["efficientnet_lite0"].box == (0, 0, 1, 1)
    small = analysis.heatmap("resnet34_ma", "Normal", (30, 24))
    assert small.shape == (30, 24) and not small[:, int(np.ceil(24 * reading.box[3])) :].any()


def test_a_network_of_the_lungs_box_sees_the_whole_picture_where_no_lung_was_found(task_pipe):
    nothing = np.zeros((64, 64), bool)
    lungs = Lungs(nothing.astype(np.float32), nothing)
    reading = task_pipe.analyze(phantom(100), ["resnet34_ma"], lungs=lungs).readings["resnet34_ma"]
    assert reading.box == (0, 0, 1, 1) and set(reading.in_lung.values()) == {0}


def test_many_x_rays_are_read_in_order_and_as_one_by_one(task_pipe):
    xrays = [XRay(phantom(100 + i, i).pixels[:, : 90 + i]) for i in range(5)]
    taken = []
    several = task_pipe.analyze_many(taken.append(i) or x for i, x in enumerate(xrays))
    first = next(several)
    assert len(taken) <= torch.get_num_threads() + AHEAD, "no more are held"
    several = [first, *several]
    assert taken == [0, 1, 2, 3, 4]
    for x, many in zip(xrays, several, strict=True):
        one = task_pipe.analyze(x)
        assert many.original is x.pixels and (many.mask == one.mask).all() and many.warnings == one.warnings
        assert many.to_dict().keys() == one.to_dict().keys() and list(many.readings) == list(one.readings)
        for model, reading in one.readings.items():
            other = many.readings[model]
            assert other.probabilities == pytest.approx(reading.probabilities, abs=1e-5)
            assert other.in_lung == pytest.approx(reading.in_lung, abs=1e-5)
            assert other.peaks == pytest.approx(reading.peaks, abs=1e-5)
            for name, heatmap in reading.heatmaps.items():
                np.testing.assert_allclose(other.heatmaps[name], heatmap, atol=1e-5)


def test_a_bad_x_ray_among_many_costs_no_other_its_analysis(task_pipe, picture, tmp_path, monkeypatch):
    def no_memory():
        raise MemoryError

    sources = [picture, tmp_path / "nowhere.png", no_memory, lambda: phantom(100)]
    good, missing, failed, called = task_pipe.analyze_many(sources, return_exceptions=True)
    assert good.original.shape == (128, 128) and called.original.shape == (100, 100)
    assert isinstance(missing, XRayError) and isinstance(failed, MemoryError)
    several = task_pipe.analyze_many(sources)
    assert next(several).original.shape == (128, 128)
    with pytest.raises(XRayError, match="no such file"):
        next(several)


def test_a_batch_that_fails_on_a_gpu_is_tried_one_by_one(task_pipe, monkeypatch):
    """Several X-rays in one batch, as a GPU has them, here on the CPU."""
    batches, analyze = [], Pipeline._analyze

    def fail(self, xrays, *options):
        batches.append(len(xrays))
        if any(x.pixels.shape == (90, 90) for x in xrays):
            raise RuntimeError
        return analyze(self, xrays, *options)

    monkeypatch.setattr(Pipeline, "_analyze", fail)
    monkeypatch.setattr(pipeline, "_alone", lambda device: False)
    xrays = [phantom(side) for side in (100, 90, 110, 120, 80)]
    found = list(task_pipe.analyze_many(xrays, batch=3, heatmaps=False, return_exceptions=True))
    assert batches == [3, 1, 1, 1, 2]
    assert [isinstance(one, RuntimeError) for one in found] == [False, True, False, False, False]
    alone = task_pipe.analyze(xrays[4]).readings["resnet34_ma"].probabilities
    assert found[4].readings["resnet34_ma"].probabilities == pytest.approx(alone, abs=1e-5)


def test_pytorch_gives_the_same_answers_as_onnx_runtime(task_pipe, monkeypatch):
    x = phantom(128)
    fast = task_pipe.analyze(x)
    assert {runtime_of(net) for net in task_pipe.classifiers.values()} == {"ONNX Runtime"}
    monkeypatch.setattr(runtime, "enabled", False)
    slow = task_pipe.analyze(x)
    assert np.abs(slow.segmentation.probability - fast.segmentation.probability).max() < 1e-4
    for model, reading in slow.readings.items():
        assert fast.readings[model].probabilities == pytest.approx(reading.probabilities, abs=1e-4)
        for name, heatmap in reading.heatmaps.items():
            np.testing.assert_allclose(fast.readings[model].heatmaps[name], heatmap, atol=1e-3)


def test_weights_that_are_changed_are_used_at_once(random_weights):
    pipe = Pipeline.load(random_weights, ["efficientnet_lite0"])
    x, lungs = phantom(64), Lungs(phantom_mask(64).astype(np.float32), phantom_mask(64))
    before = pipe.analyze(x, lungs=lungs).readings["efficientnet_lite0"].probabilities
    with torch.no_grad():
        pipe.classifiers["efficientnet_lite0"].bn2.bias += 1
    assert pipe.analyze(x, lungs=lungs).readings["efficientnet_lite0"].probabilities != before


def test_a_hook_on_any_module_is_called(random_weights):
    """PyTorch runs a network that somebody looks into; ONNX Runtime would pass its modules by."""
    pipe, seen = Pipeline.load(random_weights, ["efficientnet_lite0"]), []
    innermost = [module for module in pipe.classifiers["efficientnet_lite0"].modules() if not list(module.children())]
    for module, hook in ((innermost[0], "forward_pre"), (innermost[7], "forward")):
        handle = getattr(module, f"register_{hook}_hook")(lambda *_, hook=hook: seen.append(hook))
        pipe.analyze(phantom(64))
        handle.remove()
    assert seen == ["forward_pre", "forward"]
    pipe.analyze(phantom(64))
    assert len(seen) == 2


def test_many_x_rays_without_heatmaps(task_pipe):
    (found,) = task_pipe.analyze_many([phantom(100)], heatmaps=False)
    one = task_pipe.analyze(phantom(100))
    for model, reading in found.readings.items():
        assert reading.heatmaps == reading.peaks == reading.in_lung == reading.in_sides == {}
        assert reading.probabilities == pytest.approx(one.readings[model].probabilities, abs=1e-5)
    json.dumps(found.to_dict())
    with pytest.raises(KeyError, match="none"):
        found.heatmap("resnet34_ma", "Normal")
    (mask_alone,) = task_pipe.analyze_many([phantom(100)], models=[])
    assert mask_alone.readings == {} and mask_alone.leading == []
    assert list(task_pipe.analyze_many([])) == []
    with pytest.raises(WeightsError, match="not loaded"):
        task_pipe.analyze_many([phantom(100)], models=["resnet50"])


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "cuda:x", "abacus", "", "meta"])
@pytest.mark.parametrize("has_cuda", [False, True])
def test_a_device_that_is_not_there_is_told_in_a_sentence(random_weights, monkeypatch, device, has_cuda):
    if has_cuda and device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    with pytest.raises(WeightsError, match=r"^There is no .*device .*here; use the device 'cpu' or 'auto'\.$"):
        Pipeline.load(random_weights, [], device)


def test_a_wrong_name_is_answered_with_the_right_ones(task_pipe):
    truth = phantom_mask(64)
    analysis = task_pipe.analyze(phantom(100), lungs=Lungs(truth.astype(np.float32), truth))
    with pytest.raises(KeyError, match="'TB'.*Normal, COVID-19, Tuberculosis"):
        analysis.heatmap("resnet34_ma", "TB")
    with pytest.raises(KeyError, match="'resnet34'.*efficientnet_lite0, .*resnet34_ma"):
        analysis.heatmap("resnet34", "Normal")
    assert len(repr(analysis)) < 300 and "100 × 100" in repr(analysis) and "resnet34_ma" in repr(analysis)
    assert repr(analysis.readings["efficientnet_lite0_ma"]).startswith("Reading(guided: ")


def test_a_path_is_as_good_as_what_is_read_from_it(random_pipe, picture, tmp_path):
    expected = random_pipe.analyze(load_xray(picture)).to_dict()
    assert (
        random_pipe.analyze(str(picture)).to_dict() == random_pipe.analyze(picture.read_bytes()).to_dict() == expected
    )
    assert [a.original.shape for a in random_pipe.analyze_many([picture, phantom(100)], models=[])] == [
        (128, 128),
        (100, 100),
    ]
    with pytest.raises(XRayError, match="no such file"):
        random_pipe.analyze(tmp_path / "nowhere.png")
    assert repr(random_pipe) == f"Pipeline({', '.join(TRIO)}; on {random_pipe.device})"


def test_many_analyses_are_a_table(task_pipe):
    nothing = np.zeros((64, 64), bool)
    good = task_pipe.analyze(phantom(128), lungs=Lungs(phantom_mask(64).astype(np.float32), phantom_mask(64)))
    bad = task_pipe.analyze(phantom(128), lungs=Lungs(nothing.astype(np.float32), nothing))
    mask_alone = task_pipe.analyze(phantom(128), models=[])
    frame = to_frame([good, bad, mask_alone], ["a.png", "b.png", "c.png"])
    assert list(frame.file) == ["a.png"] * 4 + ["b.png"] * 4 + ["c.png"]
    assert list(frame.network[:4]) == task_pipe.models and list(frame.task[:4]) == ["manet", "guided", "nih14", "manet"]
    row = frame.iloc[0]
    reading = good.readings["efficientnet_lite0"]
    assert row.predicted == reading.predicted and row["Tuberculosis"] == reading.probabilities["Tuberculosis"]
    assert row.reliable and not frame.reliable[4] and set(frame.predicted[4:8]) == {"no reliable reading"}
    assert "Hardly any lung" in frame.withheld[4] and row.withheld == "" and row.warnings == good.warnings[0]
    assert np.isnan(frame["Tuberculosis"][1]) and frame.lung_area[4] == 0
    assert list(to_frame([good]).file) == ["0"] * 4 and len(to_frame([])) == 0
    with pytest.raises(ValueError):
        to_frame([good], ["a.png", "b.png"])


# --- shipped weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_segmenter_finds_the_phantoms_lungs(pipe, seed):
    analysis = pipe.analyze(phantom(512, seed), models=[])
    truth = phantom_mask(512, seed)
    assert (analysis.mask & truth).sum() / (analysis.mask | truth).sum() > 0.75


def ct_slice() -> np.ndarray:
    """A drawing of a transverse CT slice: an oval body, two lungs side by side, a spine, a round bore of air."""
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    picture = 0.6 * ((x / 0.8) ** 2 + (y / 0.55) ** 2 < 1)
    for side in (-1, 1):
        picture[((x - 0.38 * side) / 0.28) ** 2 + (y / 0.36) ** 2 < 1] = 0.08
    picture[(x / 0.1) ** 2 + ((y - 0.35) / 0.1) ** 2 < 1] = 1
    return picture


NOT_CHESTS = {
    "black": lambda: np.zeros((300, 300)),
    "white noise": lambda: np.random.default_rng(0).random((300, 300)),
    "cat": lambda: data.chelsea().mean(2),
    "coins": data.coins,
    "page": data.page,
    "camera": data.camera,
    "moon": data.moon,
    "text": data.text,
    "brick": data.brick,
    "ct slice": ct_slice,
}


@pytest.mark.parametrize("name", NOT_CHESTS)
def test_what_is_no_chest_x_ray_warns_and_gets_no_class(pipe, name):
    analysis = pipe.analyze(as_xray(NOT_CHESTS[name]()), models=[])
    assert analysis.warnings and analysis.withheld, f"{name} went through"


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
def test_no_class_where_the_header_says_another_modality(pipe, name):
    from pydicom.data import get_testdata_file

    analysis = pipe.analyze(load_xray(get_testdata_file(name, download=False)), models=["efficientnet_lite0_ma"])
    assert not analysis.reliable and name[:2] in analysis.withheld[0]
    result = analysis.to_dict()
    assert result["reliable"] is False and result["withheld"] == analysis.withheld
    assert result["readings"]["efficientnet_lite0_ma"]["predicted"] in CLASSES, "the readings are there to be looked at"


def test_a_mask_without_lung_or_with_two_faults_withholds_the_class(random_pipe):
    def analyze(mask: np.ndarray):
        return random_pipe.analyze(phantom(128), models=[], lungs=Lungs(mask.astype(np.float32), mask))

    lungs = phantom_mask(128)
    assert analyze(lungs).reliable and analyze(lungs).withheld == []
    one_side, cut_off = lungs.copy(), lungs.copy()
    one_side[:, 64:] = False
    assert analyze(one_side).warnings and analyze(one_side).reliable, "one fault is a warning"
    cut_off[:, 64:], cut_off[:, :20] = False, True
    for mask in (np.zeros_like(lungs), cut_off):
        analysis = analyze(mask)
        assert analysis.withheld and set(analysis.withheld) <= set(analysis.warnings) and not analysis.reliable


def test_a_colour_photograph_warns(pipe, tmp_path):
    from PIL import Image

    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    warnings = pipe.analyze(load_xray(tmp_path / "cat.png"), models=[]).warnings
    assert any("colour" in warning for warning in warnings)


def sample(index, source: str, n: int):
    return index[(index.split == "test") & (index.source == source)].sort_values("image").iloc[:: max(1, 60 // n)][:n]


@pytest.mark.parametrize("source", ["kermany", "shenzhen", "montgomery", "ieee8023"])
def test_real_lungs_are_found(pipe, index, source):
    from PIL import Image

    rows = sample(index[index["mask"] != ""], source, 8)
    behind_heart = source not in ("shenzhen", "montgomery")  # whose annotators leave that lung out
    size, ious, recalls = pipe.entries["resunet"]["preprocessing"]["size"], [], []
    for image, mask in zip(rows.image, rows["mask"]):
        x, truth = load_xray(image), np.asarray(Image.open(mask).convert("1"))
        found = pipe.analyze(x, models=[]).mask
        recalls.append((found & truth).sum() / truth.sum())
        if not behind_heart:  # by the segmenter's output for their convention
            shown = torch.from_numpy(to_unit_range(resize(x.pixels, size)))[None, None]
            with torch.inference_mode():
                theirs = pipe.segmenter(shown, every_convention=True)[0, 1].sigmoid().numpy()
            found = Lungs.from_probability(theirs).at(truth.shape)
        ious.append((found & truth).sum() / (found | truth).sum())
    assert np.mean(ious) > 0.8 and np.mean(recalls) > 0.8


def test_most_real_x_rays_raise_no_warning(pipe, index):
    rows = [
        image
        for source in ("kermany", "shenzhen", "montgomery", "ieee8023")
        for image in sample(index, source, 10).image
    ]
    analyses = dict(zip(rows, pipe.analyze_many(rows, models=[])))
    warned = [image for image, analysis in analyses.items() if analysis.warnings]
    withheld = [image for image, analysis in analyses.items() if not analysis.reliable]
    assert len(warned) <= 0.15 * len(rows) and len(withheld) <= 0.05 * len(rows), (warned, withheld)


def test_strangers_are_named_with_their_distance(pipe, index):
    """A photograph is further than what the limit allows; upright films are not."""
    films = [load_xray(image) for image in sample(index, "kermany", 10).image]
    upright = list(pipe.analyze_many(films, models=[]))
    assert np.mean([any("unlike the X-rays" in w for w in a.warnings) for a in upright]) <= 0.2
    photograph = pipe.analyze(as_xray(data.camera()), models=[])
    assert photograph.distance > max(a.distance for a in upright)
    assert any(f"distance {photograph.distance:.1f}" in w for w in photograph.warnings)


def test_real_x_rays_are_read_better_than_the_majority_class(pipe, index):
    rows = index[(index.split == "test") & index.label.isin(CLASSES)]
    rows = rows.groupby("label").head(8)
    right = [
        pipe.analyze(load_xray(image), models=["efficientnet_lite0_ma"]).readings["efficientnet_lite0_ma"].predicted
        == label
        for image, label in zip(rows.image, rows.label)
    ]
    assert np.mean(right) > 0.6  # chance is 0.2 here


def test_pipeline_and_training_see_the_same_input(pipe, index, weights, tmp_path):
    """What `train` reads from its cache gives the probabilities that the pipeline gives."""
    from train.data import LungPictures, Pictures, predicted_lungs

    name = "efficientnet_lite0_ma"
    view = View.of(pipe.entries[name]["preprocessing"])
    rows = index[index.label.isin(CLASSES)].iloc[::1500]
    rows.to_csv(tmp_path / "index.csv", index=False)
    pictures = Pictures(tmp_path, view.working, tmp_path / "cache")
    everything = np.arange(len(rows))
    lungs = predicted_lungs(pictures, weights, everything)
    dataset = LungPictures("classify", pictures, everything, lungs, view=view)
    for (image, mask, _), cached, path in zip(dataset, pictures.images, rows.image):
        assert np.abs(resize(load_xray(path).pixels, view.working) * 255 - cached).max() <= 0.5
        with torch.inference_mode():
            logits = pipe.classifiers[name](image[None], mask[None])[0]
        p = (logits / pipe.entries[name]["temperature"]).softmax(0).numpy()
        reading = pipe.analyze(XRay(cached.astype(np.float32) / 255), models=[name]).readings[name]
        np.testing.assert_allclose(list(reading.probabilities.values()), p, atol=1e-4)


def test_training_cuts_out_the_same_box(task_pipe, phantoms, tmp_path):
    from train.data import LungPictures, Pictures, View

    view = View.of(task_pipe.entries["resnet34_ma"]["preprocessing"])
    pictures = Pictures(phantoms, view.working, tmp_path)
    rows = np.arange(4)
    for row, (image, mask, _) in zip(rows, LungPictures("classify", pictures, rows, pictures.masks, view=view)):
        truth = pictures.masks[row] > 0
        x, lungs = XRay(pictures.images[row].astype(np.float32) / 255), Lungs(truth.astype(np.float32), truth)
        with torch.inference_mode():
            p = task_pipe.classifiers["resnet34_ma"](image[None], mask[None])[0].softmax(0).numpy()
        reading = task_pipe.analyze(x, ["resnet34_ma"], lungs=lungs).readings["resnet34_ma"]
        assert reading.box != (0, 0, 1, 1)
        np.testing.assert_allclose(list(reading.probabilities.values()), p, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_twelve_megapixels_stay_under_one_and_a_half_gigabytes(weights, tmp_path):
    """In a process of its own, from the DICOM file to the result."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    pixels = resize(phantom(512).pixels, (4000, 3000))
    ds = pydicom.Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = "DX", "MONOCHROME2", 1
    ds.Rows, ds.Columns = pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth, ds.RescaleSlope, ds.RescaleIntercept = 2048, 4096, 1, 0
    ds.PixelData = (pixels * 4095).astype("<u2").tobytes()
    path = tmp_path / "large.dcm"
    ds.save_as(path, enforce_file_format=True)
    code = (  # VmHWM, not getrusage: the latter hands the peak of the parent, all of pytest, on to its child
        "import re, sys; from pathlib import Path; from manet_core import Pipeline, load_xray\n"
        "a = Pipeline.load(sys.argv[1]).analyze(load_xray(sys.argv[2]))\n"
        "a.original, a.mask_raw, a.mask, a.lungs, a.heatmap(list(a.readings)[0], 'Normal')\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text(encoding='utf-8'))\n"
        "print(a.mask.shape, int(peak[1]) / 1e6)"
    )
    out = subprocess.run([sys.executable, "-c", code, weights, path], capture_output=True, text=True, check=True).stdout
    shape, gigabytes = out.rsplit(" ", 1)
    assert shape == "(4000, 3000)" and float(gigabytes) < 1.5
