"""The HTML of the page and the reading of uploads, without a server."""

import base64
import csv
import gc
import hashlib
import io
import json
import re
import shutil
import struct
import threading
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import wait_until
from PIL import Image

from manet_core import CLASSES, Analysis, Reading, WeightsError, XRay, XRayError, create_classifier, explain, preprocess
from manet_core.explain.gradcam import grad_cam
from manet_core.files.stored import Spacing, Stored
from manet_core.lungs import Lungs
from manet_core.networks.runtime import runtime_of
from manet_core.phantom import phantom, phantom_mask
from manet_core.table import no_formula
from manet_core.tasks import get_task
from manet_core.weights import read_manifest, write_manifest
from ui import batch, render, startup, teach, viewer
from ui.claims import Claims, claimed, summary
from ui.endpoints import add_endpoints
from ui.models import models_page, reliability_svg
from ui.networks import Film, Networks, results_of
from ui.newest import Newest, Superseded
from ui.opinion import OpinionTab
from ui.shelves import Picture, Shelved, Shelves
from ui.startup import gr
from ui.uploads import Uploads

NOTHING_MEASURED = Claims({}, Path("nowhere"))


def _reading(rng: np.random.Generator, predicted: str = "COVID-19", task: str = "manet", **options) -> Reading:
    classes = get_task(task).classes
    probabilities = {name: 0.6 if name == predicted else 0.4 / (len(classes) - 1) for name in classes}
    heatmaps = {name: rng.random((64, 64), np.float32) for name in classes}
    return Reading(
        probabilities,
        predicted,
        heatmaps,
        peaks=dict.fromkeys(classes, 0.25),
        in_lung=dict.fromkeys(classes, 0.8),
        native=(2, 2),
        in_sides=dict.fromkeys(classes, (0.5, 0.3)),
        task=task,
        **options,
    )


@pytest.fixture
def readings(rng) -> dict[str, Reading]:
    names = ["efficientnet_lite0", "efficientnet_lite0_ma", "resnet34_ma", "resnet34_cbam"]
    return {name: _reading(rng) for name in names}


@pytest.fixture
def of_three_tasks(readings, rng) -> Analysis:
    """Four networks of five classes, one of three, two of findings."""
    more = {
        "vgg16": _reading(rng, "Pneumonia", "guided"),
        "resnet50": _reading(rng, "Mass", "nih14"),
        "resnet50_ma": _reading(rng, "Pleural_Thickening", "nih14"),
    }
    return _analysis(readings | more)


def _analysis(readings: dict[str, Reading], warnings: list[str] | None = None) -> Analysis:
    pixels = phantom(128).pixels
    return Analysis(pixels, Lungs.from_probability(pixels), readings, warnings or [], 1.0)


def _picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


class _Balance(HTMLParser):
    """Fails where a tag is closed that is not the one open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _well_formed(html: str) -> None:
    parser = _Balance()
    parser.feed(html)
    assert parser.open == []


def test_the_page_may_ask_some_networks_alone(random_weights):
    assert Networks(random_weights, ["efficientnet_lite0_ma"]).get().models == ["efficientnet_lite0_ma"]
    assert len(Networks(random_weights).get().models) == 3
    with pytest.raises(WeightsError, match="no weights for 'vgg16'"):
        Networks(random_weights, ["vgg16"]).get()


def test_networks_are_made_ready_once_before_the_first_xray(random_weights):
    networks = Networks(random_weights)
    networks.warm()
    once = {thread for thread in threading.enumerate() if thread.name == "warming"}
    networks.warm()
    assert {thread for thread in threading.enumerate() if thread.name == "warming"} <= once
    wait_until(lambda: all(runtime_of(net) == "ONNX Runtime" for net in networks.get().classifiers.values()))


@pytest.fixture(scope="module")
def networks(many_tasks) -> Networks:
    """Of many tasks, loaded and made ready once."""
    return Networks(many_tasks)


@pytest.mark.parametrize("explainer", ["gradcam", "layercam"])
def test_what_is_computed_again_equals_what_came_from_the_file(networks, explainer):
    """Also for networks that are shown the lungs' box: what is kept of a film is enough."""
    x = phantom(700, seed=1)
    lungs = Lungs.from_probability(phantom_mask(224, 1).astype(np.float32))
    original = networks.analyze(x, lungs=lungs, explainer=explainer)
    film, done = networks.keep(x, networks.analyze(x, lungs=lungs)), []
    again = networks.again(film, list(film.analysis.readings), lambda *step: done.append(step), explainer=explainer)
    assert again.explainer == explainer and list(again.readings) == list(original.readings)
    assert original.readings["resnet34_ma"].box != (0, 0, 1, 1)
    for name, reading in original.readings.items():
        assert again.readings[name].probabilities == reading.probabilities
        assert again.readings[name].in_lung == reading.in_lung and again.readings[name].box == reading.box
        assert all(np.array_equal(again.readings[name].heatmaps[c], h) for c, h in reading.heatmaps.items())
    assert [step for step, _ in done] == sorted(step for step, _ in done) and done[-1] == (4, 4)


@pytest.mark.parametrize("name", [name for name in explain.list_explainers() if explain.get_explainer(name).slow])
def test_a_slow_explainer_lets_others_go_first(networks, name):
    x, read = phantom(128), []
    film = networks.keep(x, networks.analyze(x))

    def progress(done: float, count: int) -> None:
        if not read:
            with ThreadPoolExecutor(1) as pool:
                read.append(pool.submit(networks.analyze, x).result(60))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # whatever is raised there ends the work
        networks.again(film, ["efficientnet_lite0"], progress, explainer=name)
    for name, reading in film.analysis.readings.items():
        assert read[0].readings[name].probabilities == reading.probabilities
    assert networks.analyze(x).readings.keys() == film.analysis.readings.keys()


@pytest.mark.parametrize("random", [False, True])
def test_a_slow_explainer_has_modules_of_its_own_and_no_copy_of_the_weights(networks, monkeypatch, random):
    """VGG-16 has half a gigabyte of them."""
    film, seen = networks.keep(phantom(128), networks.analyze(phantom(128))), []

    def probe(net, image, mask, features):
        seen.append(net)
        return grad_cam(net, features)

    monkeypatch.setitem(explain._EXPLAINERS, "probe", explain.Explainer("probe", "Probe", probe, slow=True))
    networks.again(film, ["resnet34_ma"], random=random, explainer="probe")
    net = (networks._random if random else networks.get()).classifiers["resnet34_ma"]
    own, shared = set(seen[0].modules()), {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
    assert own.isdisjoint(net.modules()) and len(own) == len(list(net.modules()))
    assert {id(tensor) for tensor in (*seen[0].parameters(), *seen[0].buffers())} == shared
    assert not any(tensor.requires_grad for tensor in net.parameters()), "their gradients would be shared, too"


def test_little_is_kept_of_a_large_film(networks):
    x = XRay(np.tile(phantom(500).pixels, (8, 8)))
    film = networks.keep(x, networks.analyze(x))
    assert film.analysis.original.shape == (1024, 1024) and film.shape == (4000, 4000)
    assert sorted(film.inputs) == [64, 96] and film.inputs[96].shape == (96, 96)
    assert film.sha256 == hashlib.sha256(x.pixels.tobytes()).hexdigest()


def test_families_are_the_tasks_of_the_networks_that_are_run(networks, many_tasks, tmp_path):
    assert networks.tasks() == ["manet", "guided", "nih14"]
    assert networks.of_tasks(["manet"]) == ["efficientnet_lite0", "resnet34_ma"] and networks.of_tasks([]) == []
    assert Networks(many_tasks, ["efficientnet_lite0_cbam"]).tasks() == ["nih14"]
    assert Networks(tmp_path).tasks() == []
    assert networks.suited("gradcam", ["resnet34_ma"]) == ["resnet34_ma"]
    assert networks.suited("attention", ["resnet34_ma"]) == []


def test_a_kept_film_can_be_read_by_networks_that_were_not_asked_before(networks):
    """Also by one that brings it to another size."""
    x = phantom(300, seed=1)
    film = networks.keep(x, networks.analyze(x, models=["efficientnet_lite0_ma"]))
    later = networks.again(film, ["resnet34_ma"]).readings["resnet34_ma"]
    known = networks.analyze(x, models=["resnet34_ma"]).readings["resnet34_ma"]
    assert later.probabilities == pytest.approx(known.probabilities) and later.box == known.box


def test_what_is_newer_ends_what_is_older():
    newest, started, told = Newest(), threading.Event(), []

    def endless(progress) -> str:
        while True:
            started.set()
            progress(0, 1)

    def run(session: str, work) -> str:
        return (yield from newest.run(session, work, lambda done, count: (done, count)))

    def first() -> None:
        for step in run("a", endless):
            told.append(step)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(first)
        assert started.wait(10)
        assert list(run("b", lambda progress: progress(1, 2))) == [(1, 2)]  # another page's is another's
        assert not job.done()
        assert list(run("a", lambda progress: None)) == []
        with pytest.raises(Superseded):
            job.result(10)
    assert told and set(told) == {(0, 1)}


def test_older_work_tells_nothing_once_there_is_newer(monkeypatch):
    monkeypatch.setattr("ui.newest._PATIENCE", 0.05)  # the older one waits here for good, as of a page that was closed
    newest, told, go, late = Newest(), threading.Event(), threading.Event(), []

    def work(progress):
        for done in range(3):
            progress(done, 3)
        told.set()
        go.wait(10)

    older = newest.run("page", work, lambda *step: step)
    assert next(older) == (0, 3) and told.wait(10), "two more steps wait to be told"
    assert list(newest.run("page", lambda progress: progress(0, 1), lambda *step: step)) == [(0, 1)]
    go.set()
    with pytest.raises(Superseded):
        late.extend(older)
    assert late == []


def test_a_step_on_its_way_to_the_page_comes_before_the_result_of_what_is_newer():
    newest, go = Newest(), threading.Event()

    def work(progress):
        progress(0, 2)
        go.wait(10)
        progress(1, 2)

    older = newest.run("page", work, lambda *step: step)
    assert next(older) == (0, 2), "left, and the page has not got it yet"
    with ThreadPoolExecutor(1) as pool:
        newer = pool.submit(list, newest.run("page", lambda progress: "result", lambda *step: step))
        with pytest.raises(TimeoutError):
            newer.result(0.3)
        go.set()
        with pytest.raises(Superseded):
            next(older)  # the page has it
        assert newer.result(2) == []
    gc.collect()
    assert not newest._telling, "nothing is kept of a page without work"


@pytest.mark.parametrize("beside", [False, True])
def test_a_film_that_is_shown_again_ends_what_was_asked_of_another(networks, monkeypatch, tmp_path, beside):
    """What was asked of the first film is told of none but that; a second beside it does not change which is shown."""
    shelves, request = Shelves(), SimpleNamespace(session_hash="page", username=None)
    with gr.Blocks():
        tab = OpinionTab(networks, Uploads(tmp_path), Newest(), gr.State(), shelves)
        tab.connect([])
    shelf = shelves.of("page")
    for key in ("first", "second"):
        film = networks.keep(phantom(128), networks.analyze(phantom(128), models=["resnet34_ma"]), f"{key}.png", key)
        shelves.put(shelf, key, Shelved(Picture("{}", b""), film, unread=key == "second"))
    first, shelf.shown = shelf.films["first"].film, "first"
    started, go, again = threading.Event(), threading.Event(), networks.again

    def slow(*args, **options) -> Analysis:
        started.set()
        assert go.wait(60)
        return again(*args, **options)

    monkeypatch.setattr(networks, "again", slow)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: list(tab._ask(first, ["manet"], "layercam", request)))
        assert started.wait(60)
        shown = tab._open(SimpleNamespace(_data={"film": "second", "beside": beside}), request)
        go.set()
        answers = [answer for answer in asked.result(60) if tab.found in answer]
    assert shelf.shown == ("first" if beside else "second")
    if beside:
        assert answers[0][tab.found].key == "first" and answers[0][tab.explainer] == "layercam"
        assert json.loads(answers[0][tab.layers])["film"] == "first"
    else:
        assert shown[tab.found].key == "second" and shown[tab.progress] == "" and tab.readings not in shown
        assert answers == [] and shelf.films["first"].film is first


@pytest.mark.parametrize("quiz", [False, True])
def test_a_student_is_asked_of_the_film_that_the_viewer_shows(networks, tmp_path, quiz):
    """Another film may have been opened while this one was analysed: it is shown again, by its layers or by its key."""
    with gr.Blocks():
        tab = OpinionTab(networks, Uploads(tmp_path), Newest(), gr.State(), Shelves())
        tab.connect([])
    request = SimpleNamespace(session_hash="page", username=None)
    steps = list(tab._answer(lambda: phantom(96), "a.png", None, quiz, ["manet"], "gradcam", request))
    (dropped,) = [json.loads(step[tab.film]) for step in steps[:-1] if tab.film in step]
    assert len(dropped["films"]) == 1
    if quiz:
        assert json.loads(steps[-1][tab.film]) == {"open": dropped["open"], "films": []} and tab.layers not in steps[-1]
    else:
        assert json.loads(steps[-1][tab.layers])["film"] == dropped["open"] and tab.film not in steps[-1]


def test_a_manifest_may_name_its_networks_as_it_likes(random_weights, tmp_path):
    """And need not repeat the classes of their tasks."""
    for path in random_weights.iterdir():
        (tmp_path / path.name).symlink_to(path)
    entries = read_manifest(random_weights)
    named = {key: value for key, value in entries["efficientnet_lite0_ma"].items() if key != "classes"}
    write_manifest(tmp_path / "own.json", {"resunet": entries["resunet"], "our own": named})
    with gr.Blocks() as page:
        add_endpoints(Networks(tmp_path / "own.json"), Uploads(tmp_path))
    (listed,) = (function.fn for function in page.fns.values() if function.api_name == "models")
    (told,) = listed()
    assert (told["name"], told["backbone"], told["attention"]) == ("our own", "efficientnet_lite0", "ma")
    assert told["classes"] == list(CLASSES) and told["task"] == "manet"


def test_of_joined_sets_the_first_one_answers_and_all_can_be_chosen(random_weights, tmp_path, picture):
    for path in random_weights.iterdir():
        (tmp_path / path.name).symlink_to(path)
    entries = read_manifest(random_weights)
    write_manifest(tmp_path / "more.json", {"resunet": entries["resunet"], "another": entries["efficientnet_lite0"]})
    (tmp_path / "joined.json").write_text('{"sets": ["manifest.json", "more.json"]}')
    first = [name for name in entries if name != "resunet"]
    networks, uploads = Networks(tmp_path / "joined.json"), Uploads(tmp_path)
    assert networks.at_first() == first and set(networks.get().models) == {*first, "another"}
    assert Networks(tmp_path / "joined.json", ["another"]).at_first() == ["another"], "which was asked for"
    assert Networks(tmp_path / "more.json").at_first() == ["another"]
    with gr.Blocks() as page:
        add_endpoints(networks, uploads)
    endpoints = {function.api_name: function.fn for function in page.fns.values()}
    assert [told["name"] for told in endpoints["models"]()] == first

    def sent() -> dict:
        path = tmp_path / "sent" / "chest.png"
        path.parent.mkdir(exist_ok=True)
        shutil.copy(picture, path)
        return {"path": str(path), "orig_name": "chest.png"}

    assert list(endpoints["analyze"](sent())["readings"]) == first
    assert list(list(endpoints["batch"]([sent()]))[-1][0]["readings"]) == first


def test_random_networks_have_the_classes_of_their_tasks(networks):
    x = phantom(128)
    known, random = (networks.analyze(x, random=random) for random in (False, True))
    for name, reading in random.readings.items():
        assert list(reading.probabilities) == list(known.readings[name].probabilities)
        assert reading.probabilities != known.readings[name].probabilities


def test_results_lie_beside_the_weights(tmp_path):
    weights, results = tmp_path / "weights", tmp_path / "results"
    for folder in (weights, results, results / "other"):
        folder.mkdir()
    assert results_of(weights) == [], "there is no manifest"
    for name in ("manifest", "other", "third"):
        write_manifest(weights / f"{name}.json", {})
    (weights / "joined.json").write_text('{"sets": ["manifest.json", "other.json"]}')
    assert results_of(weights) == results_of(weights / "manifest.json") == [results]
    assert results_of(weights / "other.json") == [results / "other"]
    assert results_of(weights / "third.json") == [results]
    assert results_of(weights / "joined.json") == [results, results / "other"]


def test_gradio_still_needs_to_be_imported_quickly():
    """If this fails, Gradio no longer parses its sources for type stubs: `startup` can go."""

    class Parsed(Exception):
        pass

    def define() -> None:
        type("Probe", (gr.components.Component,), {"EVENTS": [gr.events.Events.change]})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gradio.component_meta.extract_class_source_code", _raise(Parsed))
        with pytest.raises(Parsed):
            define()
        patched.setattr("inspect.getfile", _raise(OSError))
        define()  # the way around it still works
    assert startup.import_gradio_quickly() is gr


def _raise(error: type[Exception]):
    def function(*_):
        raise error

    return function


def test_data_url_keeps_grey_levels():
    levels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(np.asarray(_picture(render.data_url(levels))).ravel(), np.arange(256))
    assert set(np.unique(_picture(render.data_url(levels > 0.5)))) == {0, 255}


def test_heat_picture_is_inferno_and_fades_to_nothing():
    levels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    rgba = np.asarray(_picture(render.data_url(render.heat_picture(levels))).convert("RGBA")).reshape(256, 4)
    assert rgba[0, 3] == 0 and rgba[-1, 3] == 255
    assert (np.diff(rgba[:, 3].astype(int)) >= 0).all()
    luminance = rgba[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance) > -0.5).all()  # brighter is always more


@pytest.mark.parametrize(
    "shape, expected", [((100, 50), (100, 50)), ((4000, 2000), (1024, 512)), ((64, 9999), (7, 1024))]
)
def test_fit(shape, expected):
    assert render.fit(shape, 1024) == expected


def _told(x: XRay) -> tuple[dict, np.ndarray]:
    """What the viewer is told of a film, and the values that it fetches."""
    picture = viewer.picture(x, "key", "<b>.dcm")
    (film,) = json.loads(viewer.films_text([picture], "key"))["films"]
    levels = np.frombuffer(picture.levels, "<u2" if film["deep"] else "u1")
    return film, levels.reshape(film["height"], film["width"])


def test_the_viewer_gets_every_value_of_a_film(rng):
    values = rng.integers(100, 4000, (70, 90)).astype(np.float32)
    stored = Stored.of(values, window=(1000, 2000), inverted=True)
    film, levels = _told(XRay(values, stored=stored, spacing=Spacing(0.2, 0.1, True)))
    assert np.array_equal(film["first"] + film["step"] * levels, values) and film["deep"] and film["inverted"]
    assert [film["first"] + film["step"] * edge for edge in film["start"]] == [1000, 2000]
    assert film["spacing"] == {"rows": 0.2, "columns": 0.1, "at_detector": True} and film["name"] == "<b>.dcm"
    film, levels = _told(XRay(values, stored=Stored.of(values // 16)))
    assert not film["deep"] and film["step"] == 1 and film["spacing"] is None


def test_a_large_film_is_halved_and_says_so(monkeypatch):
    monkeypatch.setattr(viewer, "MOST_PIXELS", 1000)
    film, levels = _told(phantom(101))
    assert levels.shape == (25, 25) and film["shrunk"] == 4 and (film["rows"], film["columns"]) == (101, 101)


def _layers(analysis: Analysis, whole: tuple[str, ...] = (), heatmaps: bool = True) -> dict:
    film = Film(analysis, {}, (2560, 2000), "a.png", "", datetime.now(), "key")
    return json.loads(viewer.layers_text(film, list(whole), heatmaps))


def test_layers_have_masks_and_every_heatmap(readings):
    readings["resnet34_ma"] = replace(readings["resnet34_ma"], box=(0.125, 0.25, 0.875, 0.75))
    analysis = _analysis(readings)
    found = _layers(analysis, ("alexnet", "resnet34_ma"))
    assert _picture(found["mask"]).size == (800, 1024) == _picture(found["raw"]).size
    share = (np.asarray(_picture(found["mask"])) > 127).mean()
    assert share == pytest.approx(analysis.segmentation.cleaned.mean(), abs=0.01)
    assert found["seen"].endswith("; the whole X-ray is shown to ResNet-34 (mask attention (MA))")
    assert _layers(analysis, ("alexnet",))["seen"] == "what the classifiers are shown"
    assert found["film"] == "key" and found["lead"] == "COVID-19" and found["claim"] == "COVID-19 by 4 of 4"
    assert [network["name"] for network in found["networks"]] == list(readings)
    masked = found["networks"][2]
    assert masked["box"] == [0.25, 0.125, 0.5, 0.75] and masked["title"] == "ResNet-34, mask attention (MA)"
    for name, heatmap in readings["resnet34_ma"].heatmaps.items():
        assert np.array_equal(np.asarray(_picture(masked["classes"][name]["heat"])), (heatmap * 255).round())


def test_heatmaps_stay_away_until_they_may_be_seen(readings):
    found = _layers(replace(_analysis(readings), withheld=["No lungs."]), heatmaps=False)
    assert found["networks"] == [] and found["claim"] == "No reliable reading"


def test_a_headline_names_no_class_where_it_is_withheld():
    assert render.withheld([]) == ""
    html = render.withheld(["The mask is empty.", "<b>"])
    _well_formed(html)
    assert "No reliable reading" in html and "The mask is empty." in html and "<li>&lt;b&gt;</li>" in html


def test_a_film_is_told_by_name_time_and_hash():
    when = datetime(2026, 3, 1, 14, 5, tzinfo=UTC)
    html = render.provenance("<i>$x$.png", when, "ab" * 32)
    _well_formed(html)
    assert "&lt;i&gt;$x$.png, read 2026-03-01 14:05:00 UTC, pixels SHA-256 abababababababab…" in html
    assert "ab" * 32 in html
    assert render.told("", when, "ab" * 32).startswith("read 2026")


def test_a_refusal_says_what_is_still_shown():
    html = render.refusal("<x>.txt", "This is no picture.", "film.png")
    _well_formed(html)
    assert "&lt;x&gt;.txt was not analysed" in html and "Still shown is the X-ray before it, film.png." in html
    assert "Still" not in render.refusal("", "This is no picture.", None)


def test_readings_have_a_row_a_class_and_a_column_a_network(readings):
    readings["resnet34_ma"] = replace(readings["resnet34_ma"], probabilities=dict(zip(CLASSES, (0.1, 0.7, 0.2, 0, 0))))
    html = render.readings(_analysis(readings))
    _well_formed(html)
    assert re.findall(r'<th scope="row">([^<]+)', html) == list(CLASSES)
    head = re.search("<thead>.*</thead>", html, re.S)[0]
    assert "EfficientNet-Lite0<br>plain" in head and "ResNet-34<br>CBAM" in head and head.count("<button") == 4
    assert html.count('data-network="resnet34_ma" data-name="COVID-19"') == 1 and html.count(">60.0%<") == 3
    assert html.count('class="top"') == 4
    mean = _analysis(readings).mean_of("manet")
    assert re.findall(r'<td class="mean[^>]*><span[^>]*>([^<]+)', html) == [f"{mean[name]:.1%}" for name in CLASSES]
    assert re.findall(r'<td class="mean top"><span[^>]*>([^<]+)', html) == [f"{mean['COVID-19']:.1%}"]
    one = render.readings(_analysis({"resnet34_ma": readings["resnet34_ma"]}))
    assert "by ResNet-34" in one and ">MA</button>" in one and "mean" not in one


def test_a_heatmap_is_told_with_its_figures(readings):
    told = render.figures("resnet34_ma", readings["resnet34_ma"], "Normal")
    assert told == "raw peak 0.25, 80% in lung (right 50%, left 30%), with MA partly by construction"
    assert "construction" not in render.figures("resnet34", readings["resnet34_ma"], "Normal")
    assert render.figures("vgg16_ma", readings["resnet34_ma"], "Normal").endswith("partly by construction")
    readings["resnet34_ma"].peaks["Normal"] = 0.0
    assert "empty, no evidence for this class" in render.figures("resnet34_ma", readings["resnet34_ma"], "Normal")


def _heats(html: str) -> list[np.ndarray]:
    return [np.asarray(_picture(url)) for url in re.findall(r'class="heat"\s+src="([^"]+)"', html)]  # palette numbers


def test_summary_counts(readings, rng):
    readings["resnet34_cbam"] = _reading(rng, "Normal")
    html = render.withheld(NOTHING_MEASURED.doubts(_analysis(readings)))
    _well_formed(html)
    assert "The networks disagree (COVID-19 by 3 of 4, Normal by 1 of 4)." in _shown(html)
    assert "No network was asked" in summary(_analysis({}), NOTHING_MEASURED)


def test_one_task_needs_no_title(readings):
    analysis = _analysis(readings)
    page = summary(analysis, NOTHING_MEASURED) + render.limits(analysis) + render.readings(analysis)
    assert get_task("manet").title not in page
    assert "Effusion" in render.limits(analysis) and "children" in render.limits(analysis)


def test_tasks_are_apart(of_three_tasks):
    said, limits = summary(of_three_tasks, NOTHING_MEASURED), render.limits(of_three_tasks)
    tables = render.readings(of_three_tasks)
    for html in (said, limits, tables):
        _well_formed(html)
    assert "Five classes. All 4 networks: COVID-19" in _shown(said)
    assert "Normal, pneumonia or COVID-19. Predicted: Pneumonia" in _shown(said)
    assert "14 findings. Findings of 50% or more: Mass by 1 of 2" in _shown(said)
    assert all(get_task(name).limits in _shown(limits) for name in of_three_tasks.tasks)
    captions = re.findall("<caption>([^<]+)", tables)
    assert [caption.split(" by ")[0].strip() for caption in captions] == [
        get_task(name).title for name in ("manet", "guided", "nih14")
    ]
    assert tables.count("<tr><th") == 5 + 3 + 14
    assert "Pleural Thickening" in tables and "Pleural_</" not in tables


def test_findings_need_not_sum_to_one(rng):
    reading = _reading(rng, "Mass", "nih14")
    reading.probabilities["Effusion"] = 0.9
    assert render.readings(_analysis({"resnet50": reading})).count('class="top"') == 2
    reading.probabilities.update(Mass=0.1, Effusion=0.1)
    analysis = _analysis({"resnet50": reading})
    assert 'class="top"' not in render.readings(analysis) and "or more: none" in _shown(
        summary(analysis, NOTHING_MEASURED)
    )
    assert claimed(analysis) == "no finding"


def test_notes_tell_of_the_lungs_box(rng):
    reading = _reading(rng, box=(0.125, 0.25, 0.875, 0.75))
    assert "lungs’ box" in render.notes(_analysis({"resnet34": reading}))
    assert "lungs’ box" not in render.notes(_analysis({"resnet34": _reading(rng)}))


def test_the_verdict_on_a_student_tells_agreement_and_not_truth():
    html = render.verdict("Normal", {"COVID-19": 2, "Normal": 1}, (3, 4))
    _well_formed(html)
    assert "You read Normal ; the networks predict COVID-19 by 2, Normal by 1." in _shown(html)
    assert "3 of 4" in html and "not truth" in html


def test_a_student_is_asked_for_the_classes_of_the_main_task(of_three_tasks, rng):
    assert render.reading_task(of_three_tasks).name == "manet"
    assert ("Pleural Thickening", "Pleural_Thickening") in render.choices(get_task("nih14"))
    assert render.reading_task(_analysis({"resnet50": _reading(rng, "Mass", "nih14")})).name == "nih14"
    assert render.reading_task(_analysis({})) is None


def test_notes_say_what_a_heatmap_is(readings):
    html = render.notes(_analysis(readings))
    _well_formed(html)
    assert "2×2 cells" in html and "scaled on its own" in html and "Grad-CAM" in html
    assert "is dimmed, and removed only where" in html and "to zero" not in html
    assert render.notes(_analysis({})) == ""
    by_pieces = render.notes(replace(_analysis(readings), explainer="lime"))
    assert "(LIME)" in by_pieces and "30 superpixels" in by_pieces and "cells" not in by_pieces


def test_texts_are_escaped():
    assert "<script>" not in render.alert("Warning", ["<script>alert(1)</script>"]) + render.stage("<script>")
    assert render.alert("Warning", []) == ""


# --- the models tab -------------------------------------------------------------------------------------------------


def _shown(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", html))


def test_models_page_shows_the_repositorys_figures_and_no_others(weights):
    sets = [(path, folder / "evidence.json") for path in weights.glob("*.json") for folder in results_of(path)]
    sets = [(path, evidence) for path, evidence in sets if evidence.is_file()]
    assert len(sets) > len({path for path, _ in sets}) > 1, "several sets, and one that joins some"
    for manifest, path in sets:
        html = models_page(manifest, *results_of(manifest))
        _well_formed(html)
        for found in json.loads(path.read_text(encoding="utf-8"))["models"].values():
            if "test" not in found:
                continue
            value, low, high = (100 * found["test"]["accuracy"][key] for key in ("value", "low", "high"))
            assert f"{value:.0f} ({low:.0f}–{high:.0f})" in _shown(html)
            assert f"temperature {found['calibration']['temperature']:.2f}" in html
            for row in found["test"]["confusion"]:
                assert " ".join(map(str, row)) in _shown(html)
        for mean in json.loads(path.read_text(encoding="utf-8")).get("ensemble", {}).values():
            value, low, high = (100 * mean["test"]["accuracy"][key] for key in ("value", "low", "high"))
            assert f"mean of these {len(mean['models'])} {value:.0f} ({low:.0f}–{high:.0f})" in _shown(html)
        layers = [entry["last_layer"] for entry in read_manifest(manifest).values() if "last_layer" in entry]
        assert _shown(html).count("after training, last layer") == len(layers)
        for layer in layers:
            assert f"logits lowered by Normal {layer['margins']['Normal']:.1f}" in html
            assert layer["sha256"][:16] in html


def test_models_page_tells_no_mean_of_other_weights_or_networks(weights, tmp_path):
    (results,) = results_of(weights)
    evidence = json.loads((results / "evidence.json").read_text(encoding="utf-8"))
    first = next(iter(evidence["models"]))
    evidence["measured_of"]["ensemble"][first] = 64 * "9"
    (tmp_path / "evidence.json").write_text(json.dumps(evidence))
    assert "mean of these" not in models_page(weights, tmp_path)
    few = {name: entry for name, entry in read_manifest(weights).items() if name != first}
    write_manifest(tmp_path / "few.json", few)
    assert "mean of these" not in models_page(tmp_path / "few.json", *results_of(weights))


def test_models_page_keeps_silent_on_weights_that_were_not_measured(random_weights, weights, tmp_path):
    html = models_page(random_weights, *results_of(weights))
    _well_formed(html)
    assert "Nothing has been measured of these weights" in html and html.count("not measured</summary>") == 3
    assert "missing" in models_page(tmp_path, tmp_path)


def test_models_page_groups_by_task(many_tasks, tmp_path):
    html = models_page(many_tasks, tmp_path)
    _well_formed(html)
    assert re.findall(r'<h2 class="task">([^<]+?) <', html) == [
        get_task(name).title for name in ("manet", "guided", "nih14")
    ]
    assert html.count("<details>") == 5


def test_models_page_shows_each_task_its_own_figures(many_tasks, tmp_path):
    figure, entries = {"value": 0.8, "low": 0.7, "high": 0.9}, read_manifest(many_tasks)
    diagram = {"after": {"ece": 0.02, "reliability": [{"confidence": 0.5, "accuracy": 0.5, "n": 3}]}}
    three = {
        "test": {
            "n": 9, "accuracy": figure, "confusion": [[3, 0, 0], [0, 3, 0], [0, 0, 3]],
            "per_class": {"Pneumonia": {"n": 3, "sensitivity": 1, "specificity": 1, "auroc": 1}},
        },
        "calibration": {"temperature": 1.5, "test": diagram},
        "external": {
            "adult pneumonia": {"all": {"n": 70, "sensitivity": figure}},
            "tuberculosis": {"all": {"n": 7, "sensitivity": figure}},
        },
    }  # fmt: skip
    findings = {"findings": {"mean_auroc": 0.71, "findings": {"Pleural_Thickening": figure | {"n": 4}}}}
    found = {"efficientnet_lite0_ma": three, "efficientnet_lite0_cbam": findings}
    evidence = {
        "models": {name: {"sha256": entries[name]["sha256"]} | figures for name, figures in found.items()},
        "controls": {"old": {}, "lungs": "none", "whole": {"accuracy": figure}},
    }
    (tmp_path / "evidence.json").write_text(json.dumps(evidence))
    html = models_page(many_tasks, tmp_path)
    _well_formed(html)
    text = _shown(html)
    assert "External validation" in text and "accuracy 80% on the internal test split" in text
    assert "adult pneumonia, external" in text and "Pleural Thickening 4 0.80" in text and "mean AUROC 0.71" in text
    assert "tuberculosis, external" not in text, "seven X-rays say nothing"
    assert "control" not in text  # those are of five classes


@pytest.mark.parametrize("content", ["", "[]", '{"models": {"resnet34": 1}}', '{"controls": {"stray folder": {}}}'])
def test_models_page_survives_any_evidence(many_tasks, tmp_path, content):
    (tmp_path / "evidence.json").write_text(content)
    assert "Nothing has been measured" in models_page(many_tasks, tmp_path)
    (tmp_path / "evidence.json").unlink()
    (tmp_path / "evidence.json").mkdir()
    assert "Nothing has been measured" in models_page(many_tasks, tmp_path)


def test_another_manifest_is_another_set(many_tasks, tmp_path):
    for path in many_tasks.iterdir():
        (tmp_path / path.name).symlink_to(path)
    entries = {name: read_manifest(many_tasks)[name] for name in ("resunet", "resnet34_ma")}
    write_manifest(tmp_path / "small.json", entries)
    assert Networks(tmp_path / "small.json").get().models == ["resnet34_ma"]
    assert models_page(tmp_path / "small.json", tmp_path).count("<details>") == 2


def test_reliability_diagram_puts_a_dot_where_it_belongs():
    html = reliability_svg([{"confidence": 0.5, "accuracy": 0.25, "n": 4}], side=100)
    _well_formed(html)
    assert '<circle cx="50.0" cy="75.0" r="8.0">' in html and "50% → 25%" in html


# --- many X-rays ----------------------------------------------------------------------------------------------------


def _archive(path, members: dict[str, bytes]) -> dict:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return {"path": str(path), "orig_name": path.name}


def _read(uploads: Uploads, files: list[dict]) -> dict[str, str | tuple[int, int]]:
    """{name: shape of the picture, or the sentence why there is none}."""
    out = {}
    with batch.pictures(uploads, files) as found:
        for name, read in found:
            try:
                out[name] = read().pixels.shape
            except XRayError as error:
                out[name] = str(error)
    return out


def test_batch_reads_files_and_archives_and_leaves_nothing(tmp_path, upload, png):
    single = upload(png) | {"orig_name": "single.png"}
    members = {"a/b.png": png, "../../evil.png": png, "__MACOSX/._b.png": b"x", "notes.txt": b"text", "a/": b""}
    archive = _archive(tmp_path / "uploads" / "f" / "films.zip", members)
    found = _read(Uploads(tmp_path / "uploads"), [single, archive])
    assert "not a picture" in found.pop("notes.txt")
    assert found == dict.fromkeys(["single.png", "b.png", "evil.png"], (96, 96))
    assert list((tmp_path / "uploads").iterdir()) == []


def test_batch_refuses_what_unpacks_to_too_much(tmp_path, png, monkeypatch):
    monkeypatch.setattr(batch, "MOST_BYTES", 100_000)
    archive = _archive(tmp_path / "uploads" / "b" / "bomb.zip", {"bomb.png": bytes(200_000), "good.png": png})
    found = _read(Uploads(tmp_path / "uploads"), [archive])
    assert "larger than" in found["bomb.png"] and found["good.png"] == (96, 96)


def test_batch_refuses_bad_archives_in_their_own_line(tmp_path, png):
    path = tmp_path / "uploads" / "b" / "bad.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK nothing")
    whole = _archive(tmp_path / "uploads" / "c" / "cut.zip", {"x.png": png})
    data = bytearray((tmp_path / "uploads" / "c" / "cut.zip").read_bytes())
    data[60:80] = bytes(20)  # within the compressed picture
    (tmp_path / "uploads" / "c" / "cut.zip").write_bytes(data)
    strange = {"path": "/etc/passwd.zip"}
    found = _read(Uploads(tmp_path / "uploads"), [{"path": str(path)}, whole, strange])
    assert "damaged" in found["bad.zip"] and "cannot be unpacked" in found["x.png"]
    assert "not an upload" in found["passwd.zip"]
    assert list((tmp_path / "uploads").iterdir()) == []


def test_batch_bounds_what_an_archive_unpacks_in_all(tmp_path, png, monkeypatch):
    monkeypatch.setattr(batch, "MOST_UNPACKED", 2 * len(png) + 1)
    archive = _archive(tmp_path / "uploads" / "b" / "many.zip", {f"{number}.png": png for number in range(5)})
    found = _read(Uploads(tmp_path / "uploads"), [archive])
    assert [found["0.png"], found["1.png"]] == [(96, 96)] * 2
    assert "more than" in found["3.png"] and "more than" in found["4.png"]


def test_batch_refuses_a_hundred_thousand_entries_without_listing_them(tmp_path):
    """A table of contents of 4.6 MB in a file of no more."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 0, 20, 0, *[0] * 14)
    count = 100_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, count * len(entry), 0, 0)
    path = tmp_path / "uploads" / "b" / "many.zip"
    path.parent.mkdir(parents=True)
    path.write_bytes(entry * count + end)
    tracemalloc.start()
    found = _read(Uploads(tmp_path / "uploads"), [{"path": str(path)}])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "lists far more than 1000" in found["many.zip"] and peak < 8 << 20


def test_batch_refuses_archives_of_other_kinds(tmp_path, png):
    """One in another, one with a password, and one of LZMA."""
    inner = _archive(tmp_path / "inner.zip", {"x.png": png})
    nested = _archive(tmp_path / "uploads" / "a" / "nested.zip", {"inner.zip": Path(inner["path"]).read_bytes()})
    locked = tmp_path / "uploads" / "b" / "locked.zip"
    locked.parent.mkdir(parents=True)
    data = bytearray(Path(inner["path"]).read_bytes())
    for header, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(header) + flags] |= 1
    locked.write_bytes(data)
    with zipfile.ZipFile(tmp_path / "uploads" / "b" / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("y.png", png)
    with zipfile.ZipFile(tmp_path / "uploads" / "b" / "plain.zip", "w") as archive:
        archive.writestr("z.tiff", _large_tiff())
    others = [{"path": str(tmp_path / "uploads" / "b" / name)} for name in ("locked.zip", "lzma.zip", "plain.zip")]
    found = _read(Uploads(tmp_path / "uploads"), [nested, *others])
    assert "inside an archive" in found["inner.zip"] and "without a password" in found["x.png"]
    assert "unusual way" in found["y.png"] and found["z.tiff"] == (1600, 3000)


def _large_tiff() -> bytes:
    """A picture that is stored in more bytes than an archive's table of contents may have."""
    file = io.BytesIO()
    Image.fromarray(np.arange(1600 * 3000, dtype=np.uint32).reshape(1600, 3000).view(np.int32)).save(file, "TIFF")
    return file.getvalue()


def test_batch_refuses_too_many_and_deletes_them(tmp_path, upload, png, monkeypatch):
    monkeypatch.setattr(batch, "MOST_FILES", 0)
    with pytest.raises(XRayError, match="at most 0"), batch.pictures(Uploads(tmp_path / "uploads"), [upload(png)]):
        pass
    assert list((tmp_path / "uploads").iterdir()) == []


def test_batch_without_weights_leaves_nothing(tmp_path, upload, png):
    sent = [upload(png)]
    with pytest.raises(WeightsError):
        list(batch.read_all(Networks(tmp_path / "none"), Uploads(tmp_path / "uploads"), sent))
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.fixture
def rows(readings) -> list[dict]:
    return [batch.row("=1+1.png", _analysis(readings, ["Look & see."])), batch.row("<b>.png", "It is no picture.")]


def test_csv_has_a_line_a_file_and_no_formula(rows):
    good, bad = csv.DictReader(io.StringIO(batch.as_csv(rows)))
    assert good["file"] == "'=1+1.png" and good["consensus"] == "COVID-19"
    assert good["votes"] == "COVID-19 4" and good["networks"] == "4"
    assert float(good["resnet34_ma: COVID-19"]) == 0.6 and good["warnings"] == "Look & see."
    assert bad["file"] == "<b>.png" and bad["error"] == "It is no picture." and bad["resnet34_ma: COVID-19"] == ""


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\t=1", "\r\n=1", " =1", "＝1", "\x00=1"])
def test_csv_never_begins_a_cell_with_a_formula(name):
    (line,) = csv.reader(batch.as_csv([batch.row(f"{name}.png", "It is no picture.")]).splitlines()[1:])
    assert line[0].startswith("'") and line[0].isprintable()
    assert no_formula(name) == f"'{name}", "for the command line's table too"


@pytest.mark.parametrize("name", ["<img src=x onerror=alert(1)>.png", '"><script>alert(1)</script>', "a$\\frac$.png"])
def test_table_shows_a_file_name_as_text(name):
    drawn = batch.table([batch.row(name, "It is no picture.")], 1, running=True)
    assert escape(name) in drawn and "<script" not in drawn and "<img" not in drawn


def test_table_and_csv_name_no_class_where_it_is_withheld(readings):
    rows = [batch.row("x.png", replace(_analysis(readings, ["No lungs.", "Dark."]), withheld=["No lungs."]))]
    (line,) = csv.DictReader(io.StringIO(batch.as_csv(rows)))
    assert line["consensus"] == "no reliable reading" and line["votes"] == line["networks"] == ""
    assert line["withheld"] == "No lungs." and line["warnings"] == "No lungs. Dark."
    assert line["resnet34_ma: COVID-19"] == "0.6000"  # what was answered all the same
    html = batch.table(rows, 1, running=True)
    _well_formed(html)
    assert ">no reliable reading<" in html and ">COVID-19<" not in html and "No lungs. Dark." in html
    assert json.loads(batch.as_json(rows))[0]["withheld"] == ["No lungs."]


def test_networks_that_disagree_name_no_class(readings, rng):
    readings["resnet34_ma"] = _reading(rng, "Normal")
    rows = [batch.row("x.png", _analysis(readings))]
    (line,) = csv.DictReader(io.StringIO(batch.as_csv(rows)))
    assert line["consensus"] == "no reliable reading" and line["votes"] == "COVID-19 3, Normal 1"
    html = batch.table(rows, 1, running=True)
    assert ">no reliable reading<" in html and ">COVID-19 3, Normal 1 of 4<" in html and "%</td>" in html
    assert json.loads(batch.as_json(rows))[0]["claims"] == {"manet": None}


def test_networks_that_are_not_sure_enough_name_no_class(readings):
    for point, consensus in ((0.6, "COVID-19"), (0.61, "no reliable reading")):
        readings["resnet34_ma"] = replace(readings["resnet34_ma"], operating_point=point)
        rows = [batch.row("x.png", _analysis(readings))]
        (line,) = csv.DictReader(io.StringIO(batch.as_csv(rows)))
        assert line["consensus"] == consensus and line["votes"] == "COVID-19 4"


def test_json_is_what_the_command_line_writes(rows):
    good, bad = json.loads(batch.as_json(rows))
    assert good["readings"]["resnet34_ma"]["predicted"] == "COVID-19" and "thumbnail" not in good
    assert bad == {"file": "<b>.png", "error": "It is no picture."}


def test_batch_table(rows):
    html = batch.table(rows, 3, running=True)
    _well_formed(html)
    assert "2 of 3 files, 1 not read …" in _shown(html) and "download" not in html
    assert "4 of 4" in html and "60%" in html and "<b>.png" not in html and "Look &amp; see." in html
    saved = re.findall(r'download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', batch.table(rows, 3, running=False))
    assert [name for name, _ in saved] == ["MANet.csv", "MANet.json"]
    assert base64.b64decode(saved[0][1]).decode() == batch.as_csv(rows)


def test_batch_has_columns_for_each_task(of_three_tasks):
    rows = [batch.row("x.png", of_three_tasks), batch.row("y.png", "It is no picture.")]
    good, bad = csv.DictReader(io.StringIO(batch.as_csv(rows)))
    assert good["Five classes: consensus"] == "COVID-19" and good["Five classes: networks"] == "4"
    assert good["Normal, pneumonia or COVID-19: consensus"] == "Pneumonia"
    assert good["14 findings: consensus"] == "Mass, Pleural Thickening"  # half of the networks each
    assert good["14 findings: votes"] == "Mass 1, Pleural Thickening 1" and float(good["vgg16: Pneumonia"]) == 0.6
    assert "vgg16: Tuberculosis" not in good and good["resnet50: Mass"] == "0.6000"
    assert bad["error"] == "It is no picture." and bad["14 findings: networks"] == ""
    html = batch.table(rows, 2, running=False)
    _well_formed(html)
    cells = [len(re.findall("<t[dh][ >]", row)) for row in re.findall("<tr>.*?</tr>", html, re.S)]
    assert cells == [2 + 3 * 3 + 2] * 3
    assert all(get_task(name).limits in _shown(html) for name in of_three_tasks.tasks)
    (first, _) = json.loads(batch.as_json(rows))
    assert first["readings"]["resnet50"]["task"] == "nih14" and "consensus" not in first


# --- comparing attentions -------------------------------------------------------------------------------------------


def test_a_drawn_mask_comes_back(rng):
    mask = rng.random((224, 224)) > 0.5
    assert np.array_equal(teach.drawn_mask(render.data_url(teach.painted(mask))), mask)


@pytest.mark.parametrize("url", [None, "", "data:image/png;base64,????", "data:image/png;base64,AAAA",
                                 render.data_url(np.zeros((8, 8), bool))])  # fmt: skip
def test_what_is_no_drawn_mask_is_none(url):
    assert teach.drawn_mask(url) is None


def test_grid_has_a_row_an_attention_and_a_column_a_class(readings):
    analysis = _analysis({name: readings[name] for name in ("resnet34_ma", "resnet34_cbam")})
    seen, inside = teach.shown_input(analysis.original, analysis.segmentation, preprocess.View(128, 128), "outside")
    html = teach.grid(analysis, dict.fromkeys(analysis.readings, seen), "all but the lungs", random=True, told="Drawn.")
    _well_formed(html)
    assert re.findall(r'<th scope="row">([^<]+)', html) == ["mask attention (MA)", "CBAM"]
    assert html.count('class="heat"') == 2 * len(CLASSES) and html.count('class="top"') == 2
    assert "<b>all but the lungs</b>" in html and "RANDOM" in html and "Drawn." in html
    drawn = np.asarray(_picture(re.search(r"--shown:url\(([^)]+)\)", html)[1]))
    assert (drawn[inside] == 0).all() and (drawn[~inside] > 0).any()


def test_networks_of_one_backbone_and_one_task_are_compared():
    five = dict.fromkeys(["efficientnet_lite0", "efficientnet_lite0_ma", "resnet34_ma", "resnet34_cbam"], "manet")
    assert teach.groups(five) == {
        "EfficientNet-Lite0": ["efficientnet_lite0", "efficientnet_lite0_ma"],
        "ResNet-34": ["resnet34_ma", "resnet34_cbam"],
    }
    found = teach.groups(five | {"alexnet": "covid", "alexnet_attn2": "covid"})
    assert found["AlexNet: COVID-19 or normal"] == ["alexnet", "alexnet_attn2"] and len(found) == 3


def test_the_first_input_is_what_the_networks_are_made_for():
    (first, made), *others = teach.inputs({"whole"})
    assert (first, made) == ("the whole picture, as always", teach.AS_MADE)
    assert ("the lungs", "lungs") in others and "whole" not in dict(others).values() and len(others) == 5
    assert teach.inputs({"lungs"})[0] == ("the lungs, as always", teach.AS_MADE)
    assert len(teach.inputs({"lungs", "whole"})) == 7


def test_a_network_of_the_whole_xray_is_shown_it(rng):
    picture, lungs = phantom(96).pixels, Lungs.from_probability(phantom_mask(96).astype(np.float32))
    whole = preprocess.View(96, 96, sees="whole")
    shown, _ = teach.shown_input(picture, lungs, whole, teach.AS_MADE)
    assert np.array_equal(shown, preprocess.network_input(picture, lungs.at(96), "whole", rng))
    alone, _ = teach.shown_input(picture, lungs, whole, "lungs")
    assert (alone[~lungs.at(96)] == -1).all()


def test_attention_of_a_network_is_shown_with_its_weight():
    alpha = torch.full((1, 1, 4, 5), 0.04)
    alpha[0, 0, 1, 2] = 0.24
    html = teach.attended([alpha], "AlexNet", np.zeros((96, 96), np.float32))
    _well_formed(html)
    assert "<b>4×5</b>" in html and "4.8 times" in html  # 0.24 of 1, where an equal share is 1 of 20
    heat = _heats(html)[0]
    assert heat.shape == (224, 224) and np.unravel_index(heat.argmax(), heat.shape)[0] < 112


def test_the_input_that_is_shown_is_what_the_network_gets(networks):
    x = phantom(300, seed=1)
    lungs = Lungs.from_probability(phantom_mask(224, 1).astype(np.float32))
    film = networks.keep(x, networks.analyze(x, lungs=lungs))
    net, got = networks.get().classifiers["resnet34_ma"], []
    hook = net.forward_features
    net.forward_features = lambda image, mask: got.append((image, mask)) or hook(image, mask)
    try:
        networks.again(film, ["resnet34_ma"])
    finally:
        del net.forward_features
    picture, view = networks.input_of(film, "resnet34_ma"), networks.view("resnet34_ma")
    image, mask = teach.shown_input(picture, lungs, view, teach.AS_MADE)
    assert np.array_equal(image, got[0][0][0, 0].numpy()) and np.array_equal(mask, got[0][1][0, 0].numpy() > 0.5)


def test_receptive_fields_follow_from_kernels_and_strides():
    # stem 7×7/2, then 3×3 pooling/2, then in layer 1 six 3×3 convolutions: r + (k − 1) · jump
    fields = teach.receptive_fields(create_classifier("resnet34_ma"), 224)
    assert fields[:4] == (7, 11, 19, 27)
    assert fields[7] == 11 + 6 * 8


def test_pyramid_counts_what_mask_attention_silences():
    net = create_classifier("resnet34_ma").eval()
    mask = np.zeros((224, 224), bool)
    mask[:112] = True
    html = teach.pyramid(net, "ResNet-34", mask)
    _well_formed(html)
    assert re.findall(r"<b>(\d+×\d+)</b>", html) == ["112×112", "56×56", "28×28", "14×14", "7×7"]
    assert "covers 7×7 pixels" in html
    # Rows whose seven pixels all lie in the lower half; cells that see nothing but lung, away from the frame
    zero, kept = 54 / 112, 53 * 109 / 112**2
    stem = f"set to zero in {zero:.0%} of the cells, weakened in {1 - zero - kept:.0%}, kept in {kept:.0%}"
    assert stem in re.sub(r"\s+", " ", html)


# --- uploads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def upload(tmp_path):
    """Stores bytes as Gradio does, and returns what it hands over."""

    def store(data: bytes) -> dict:
        path = tmp_path / "uploads" / "hash" / "x.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return {"path": str(path)}

    return store


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((phantom(96).pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_upload_is_read_and_deleted(tmp_path, upload, png):
    uploads = Uploads(tmp_path / "uploads")
    assert uploads.read(upload(png)).pixels.shape == (96, 96)
    assert list((tmp_path / "uploads").iterdir()) == []


def test_bad_upload_is_deleted_too(tmp_path, upload):
    with pytest.raises(XRayError, match="not a picture"):
        Uploads(tmp_path / "uploads").read(upload(b"text"))
    assert list((tmp_path / "uploads").iterdir()) == []


def test_an_upload_is_read_once_and_nothing_of_it_is_remembered(tmp_path, upload, png):
    """Neither the picture nor that there was none."""
    uploads = Uploads(tmp_path / "uploads")
    for _ in range(2):
        sent = upload(png)
        assert uploads.read(sent).pixels.shape == (96, 96)
        with pytest.raises(XRayError):
            uploads.read(sent)


@pytest.mark.parametrize("sent", [None, {}, {"path": None}, {"path": "/etc/hostname"}, {"path": "uploads/../x"}])
def test_nothing_but_uploads_is_read(tmp_path, sent):
    with pytest.raises(XRayError, match="send"):
        Uploads(tmp_path / "uploads").read(sent)
