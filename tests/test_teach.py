"""Teaching: a lecturer's case list, the screens of the projector, the phantoms of the lessons."""

import csv
import io
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, WAIT_S, behind_shipped_segmenter, expect, make_weights, served
from PIL import Image

import app
from manet_core import Analysis, create_classifier
from manet_core.heatmap_means import alike
from manet_core.lungs import Lungs
from manet_core.phantom import PLACES, phantom, phantom_mask
from manet_core.tasks import get_task
from ui import cases, lecture
from ui.cases import CasesError, asked_task, load_cases
from ui.lecture import SCREENS, Show, compared_networks, watched, without_lungs
from ui.lessons import LESSONS, lesson
from ui.networks import Networks
from ui.teach import AS_MADE, shown_input

TASK = get_task("manet")
FORMULA = "=1+1"


def _film(path: Path, seed: int = 0, opacity: float = 0.0) -> Path:
    Image.fromarray((phantom(128, seed, opacity).pixels * 255).astype(np.uint8)).save(path)
    return path


def _list(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    (folder / "answers.csv").write_text(text, encoding=encoding)
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    """Two films of a lecturer's; the list is still to be written."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "more").mkdir()
    _film(folder / "viral.png")
    _film(folder / "more" / "tb.png", 1, 0.8)
    return folder


@pytest.fixture
def listed(films) -> Path:
    """A case list whose notes are markup and a formula."""
    lines = ["viral.png,viral PNEUMONIA,<b>From</b> day 3", f"more\\tb.png,Tuberculosis,{FORMULA}"]
    return _list(films, "\n".join(["file,answer,note", *lines]))


def test_a_case_list_is_read_from_a_folder_and_from_an_archive(listed, tmp_path):
    found = load_cases(listed, TASK)
    assert [(case.file, case.answer, case.note) for case in found.cases] == [
        ("viral.png", "Viral pneumonia", "<b>From</b> day 3"), ("more\\tb.png", "Tuberculosis", FORMULA),
    ]  # fmt: skip
    assert found.cases[1].read().pixels.shape == (128, 128)
    with zipfile.ZipFile(tmp_path / "cases.zip", "w") as archive:
        for path in listed.rglob("*.*"):
            archive.write(path, Path("lecture") / path.relative_to(listed))
    packed = load_cases(tmp_path / "cases.zip", TASK)
    assert [case.answer for case in packed.cases] == [case.answer for case in found.cases]
    assert np.array_equal(packed.cases[1].read().pixels, found.cases[1].read().pixels)


def test_a_list_from_a_spreadsheet(films):
    found = load_cases(_list(films, "\ufeffAnswer;File\r\nNormal;viral.png\r\n;\r\n"), TASK)
    assert [(case.file, case.answer, case.note) for case in found.cases] == [("viral.png", "Normal", "")]


@pytest.mark.parametrize(
    "lines, problems",
    [
        (["nothing.png,Normal"], ["line 2, 'nothing.png': there is no such file"]),
        (["viral.png,Flu"], ["line 2, 'viral.png': the answer 'Flu' is unknown; write one of Normal, COVID-19"]),
        (["viral.png,Normal", "./viral.png,Normal"], ["line 3, './viral.png': the film is in line 2 already"]),
        (["../viral.png,Normal"], ["the path leaves the folder"]),
        (["/etc/passwd,Normal", "C:\\a.png,Normal"], ["line 2, '/etc/passwd': the path leaves", "line 3, 'C:"]),
        (["answers.csv,Normal"], ["'answers.csv': This is not a picture"]),
        ([",Normal"], ["the line names no file"]),
        (["viral.png,Normal,a,b"], ["line 2: there are 4 cells for 3 columns"]),
        ([], ["answers.csv has 0 films"]),
        (["a.png,Normal"] * 501, ["answers.csv has 501 films; give from 1 to 500"]),
    ],
)
def test_what_is_wrong_with_a_case_list_is_told_before_the_page_starts(films, lines, problems, monkeypatch):
    monkeypatch.setattr("ui.server.serve", lambda *_: pytest.fail("the page was started"))
    _list(films, "\n".join(["file,answer,note", *lines]))
    with pytest.raises(SystemExit) as told:
        app.main(["--cases", str(films), "--weights", "nowhere"])
    sentences = str(told.value).splitlines()
    assert len(sentences) == len(problems) and all(s.endswith(".") for s in sentences)
    for problem, sentence in zip(problems, sentences):
        assert problem in sentence


def test_what_is_no_case_list(films, tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK no more")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.png").symlink_to(films / "viral.png")
    _list(tmp_path / "link", "file,answer\na.png,Normal\n")
    for path, said in (
        (tmp_path / "gone", "is not there"),
        (tmp_path, "has no answers.csv"),
        (tmp_path / "broken.zip", "no zip archive"),
        (tmp_path / "empty.zip", "has no file answers.csv"),
        (tmp_path / "link", "the path leaves the folder"),
    ):
        with pytest.raises(CasesError, match=said):
            load_cases(path, TASK)
    with pytest.raises(CasesError, match="needs a first line with the columns"):
        load_cases(_list(films, "name,truth\nviral.png,Normal\n"), TASK)
    with pytest.raises(CasesError, match="CSV UTF-8"):
        load_cases(_list(films, "file,answer,note\nviral.png,Normal,é\n", "latin-1"), TASK)


def test_answers_are_of_the_first_task_with_one_answer():
    assert asked_task(["nih14", "guided"]).name == "guided"
    assert asked_task(["nih14"]).name == "nih14" and asked_task([]).name == "manet"


def test_a_score_is_against_the_lecturer_and_the_file_holds_no_formula():
    two = tuple(cases.Case(f"{i}.png", TASK.classes[i % 2], FORMULA, None) for i in range(10))
    found = cases.CaseList(TASK, two)
    answers = {i: TASK.classes[0] for i in range(8)}
    assert found.next_of(answers) == 8 and found.next_of(dict.fromkeys(range(10), "")) is None
    told = re.sub(r"\s+", " ", cases.score(found, answers))
    assert "4 of 8 right: 50%" in told and "95% interval 22–78" in told  # Wilson, by hand: 21.5 to 78.5
    assert "2 of 10 films have no answer yet" in told
    rows = [re.findall(r">(\d)</td>", row) for row in told.split("<tr>")[2:]]
    assert rows == [["4", "0"], ["4", "0"]]
    assert cases.score(found, {}) == ""
    first, *rest = csv.DictReader(io.StringIO(cases.as_csv(found, answers, "\t=1+1\n")))
    assert first["student"].startswith("'") and first["note"] == f"'{FORMULA}" and first["right"] == "yes"
    assert len(rest) == 7 and rest[0]["right"] == "no" and rest[0]["lecturer"] == "COVID-19"


@pytest.fixture(scope="module")
def four(weights, tmp_path_factory) -> Path:
    """Random networks of one backbone by each attention, behind the shipped segmenter."""
    names = [f"efficientnet_lite0{attention}" for attention in ("", "_ma", "_nma", "_cbam")]
    random = make_weights(tmp_path_factory.mktemp("four"), dict.fromkeys(names, "manet"))
    return behind_shipped_segmenter(random, weights, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def server(four, films, tmp_path_factory):
    """The page with a case list."""
    _list(films, f"file,answer,note\nviral.png,Viral pneumonia,<b>From</b> day 3\nmore/tb.png,Tuberculosis,{FORMULA}")
    options = ["--cases", str(films), "--models", "efficientnet_lite0", "efficientnet_lite0_ma"]
    with served(four, tmp_path_factory.mktemp("server"), *options) as url_and_uploads:
        yield url_and_uploads


@pytest.fixture(scope="module")
def desk(server, chromium):
    """One page for all tests: first the list is read, then the projector is started."""
    context = chromium.new_context(viewport={"width": 1280, "height": 720})
    page = context.new_page()
    page.set_default_timeout(1000 * WAIT_S)
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(server[0])
    yield page
    assert page.faults == []
    context.close()


def _faults(page) -> list[str]:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")]


def test_a_student_reads_the_list_film_by_film(server, films, desk):
    page, (_, uploads) = desk, server
    before = {path: path.stat().st_mtime for path in films.rglob("*")}
    for number, (answer, right, note) in enumerate(
        [("Viral pneumonia", "right", "<b>From</b> day 3"), ("Normal", "not right", FORMULA)], 1
    ):
        page.click(f"button:has-text('Show case {number}')")
        page.wait_for_selector(f"#read >> text=Case {number}, read")
        page.wait_for_selector("text=What do you see?")
        assert not re.search(r"tb\.png|viral\.png", page.inner_text("main"))
        assert not page.is_visible(".readings") and page.is_disabled(".toolbar button:text-is('Mask')")
        assert page.is_disabled("button[role=tab]:has-text('Compare attention')")
        page.click(f"#quiz label:has-text('{answer}')")
        page.wait_for_selector(f"#verdict >> text=You answered {answer}, which is {right}")
        assert page.inner_text(".lecturer") == note and "The networks say: " in page.inner_text("#verdict")
        expect(page.locator("button[role=tab]:has-text('Compare attention')")).to_be_enabled()
    page.wait_for_selector("#score >> text=1 of 2 right: 50%")
    assert not page.is_visible("button:has-text('Show case')")
    assert _faults(page) == []
    page.fill("#student input, #student textarea", "=Erika")
    with page.expect_download() as download:
        page.click("button:has-text('Save my answers as CSV')")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"))))
    assert [(row["case"], row["right"]) for row in rows] == [("1", "yes"), ("2", "no")]
    assert {row["student"] for row in rows} == {"'=Erika"}
    assert {path: path.stat().st_mtime for path in films.rglob("*")} == before
    assert not [path for path in uploads.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite0_nma", "resnet34_ma"])
def test_watching_a_network_changes_nothing(name, rng):
    torch.manual_seed(0)
    net = create_classifier(name).eval()
    image, mask = rng.uniform(-1, 1, (96, 96)).astype(np.float32), phantom_mask(96)
    given = [torch.from_numpy(x.astype(np.float32))[None, None] for x in (image, mask)]
    seen = watched(net, net.attention, image, mask)
    with torch.inference_mode():
        watcher = lecture.Watched(given[1], net.attention)
        assert torch.equal(net.walk(given[0], watcher)[0], net.forward_features(*given))
        maps = {m.shape[-1]: m[0, 0].numpy() for m in net.attention_maps(given[1])}
    assert len(seen) >= 3 and min(seen) <= 6
    for side, (values, activation) in seen.items():
        assert activation.shape == (side, side) and (activation >= 0).all()
        if maps:
            assert (activation[values == 0] == 0).all()
    if maps:
        assert np.array_equal(seen[min(seen)][0], maps[min(maps)])


def test_heatmaps_are_alike_as_their_correlation_says(rng):
    a = rng.random((8, 8))
    assert alike(a, 0.3 * a + 0.1) == pytest.approx(1) and alike(a, 1 - a) == pytest.approx(-1)
    assert alike(a, np.zeros((8, 8))) is None
    assert "without the shadow" in lecture.what_cam_says([[], ["ma"]], 4)
    assert "stays where it was" in lecture.what_cam_says([[""], []], 4)
    assert "All 4 heatmaps changed" in lecture.what_cam_says([[], []], 4)


def test_accuracy_without_lungs_is_told_from_the_evidence(tmp_path):
    controls = json.loads((ROOT / "results" / "evidence.json").read_text(encoding="utf-8"))["controls"]
    told = " ".join(without_lungs(ROOT / "results"))
    gain, elsewhere = (controls["outside"]["minus_lungs"][name] for name in ("accuracy", "external_groups"))
    for figure in (controls["outside"]["accuracy"], controls["lungs"]["accuracy"]):
        assert f"{100 * figure['value']:.1f}% ({100 * figure['low']:.1f}–{100 * figure['high']:.1f})" in told
    assert f"{abs(100 * gain['value']):.1f} points" in told and f"{abs(100 * elsewhere['value']):.1f} points" in told
    assert f"on {controls['outside']['n']} test films" in told

    def said(value: float, low: float, high: float) -> str:
        controls["outside"]["minus_lungs"]["accuracy"] = {"value": value, "low": low, "high": high}
        (tmp_path / "evidence.json").write_text(json.dumps({"controls": controls}))
        return without_lungs(tmp_path)[1]

    assert "20.0 points <b>worse</b> (95% interval 10.0–30.0). So some of the accuracy needs" in said(-0.2, -0.3, -0.1)
    assert "<b>better</b>" in said(0.2, 0.1, 0.3) and "which may be chance. So such" in said(0.01, -0.02, 0.04)
    assert without_lungs(tmp_path / "none") == [
        "For these weights, nothing was recorded of networks that are shown no lungs."
    ]


@pytest.fixture(scope="module")
def show(four) -> Show:
    """Of small phantoms."""
    networks, made = Networks(four), {}

    def film(name: str):
        if name not in made:
            x, lungs = lesson(name, 128), Lungs.from_probability(phantom_mask(128, 4).astype(np.float32))
            made[name] = networks.keep(x, Analysis(x.pixels, lungs, {}, []))
        return made[name]

    return Show(networks, compared_networks(networks), film("One shadow"), film, lambda done, count: told.append(done))


told = []


def test_networks_of_one_backbone_are_compared_if_one_is_plain_and_one_has_ma():
    def compared(**tasks: str) -> dict:
        pipeline = SimpleNamespace(models=list(tasks), entries={name: {"task": task} for name, task in tasks.items()})
        return compared_networks(SimpleNamespace(get=lambda: pipeline))

    lite = dict.fromkeys(["efficientnet_lite0_cbam", "efficientnet_lite0", "efficientnet_lite0_ma"], "manet")
    found = {"": "efficientnet_lite0", "ma": "efficientnet_lite0_ma", "cbam": "efficientnet_lite0_cbam"}
    assert compared(resnet34="manet", resnet34_ma="manet", **lite) == found and list(found) == list(compared(**lite))
    assert compared(resnet34="manet", resnet34_ma="guided", vgg16="nih14", vgg16_ma="nih14") == {}


def test_screens_say_what_was_computed(show):
    texts = {title: re.sub(r"\s+", " ", re.sub("<[^>]+>", "", draw(show))) for title, draw in SCREENS.items()}
    mask, cam, accuracy, attention = texts.values()
    (found,) = show.readings([show.film])
    (blind,) = show.readings([show.film], sees="outside")
    (clear,) = show.readings([show.phantoms("Nothing to find")])
    reading = found.readings["efficientnet_lite0_ma"]
    class_ = found.leading_of("manet")[0]
    assert f"MA {reading.in_lung[class_]:.0%}" in attention and "They agree: Viral pneumonia by 4" in attention
    same = sum(r.predicted == blind.readings[name].predicted for name, r in found.readings.items())
    assert f"Without the lungs, {same} of 4 networks name the same class" in accuracy
    assert "nothing was recorded" in accuracy  # of random networks
    r = alike(*(x.heatmap("efficientnet_lite0", class_, (64, 64)) for x in (found, clear)))
    stated = re.search(r"taken away: in (\d) of 4 networks .*? \(plain (empty|[−.\d]+)", cam)
    assert stated[2] == ("empty" if r is None else f"{r:.2f}".replace("-", "−"))
    networks, name = show.networks, show.models["ma"]
    picture, view = networks.input_of(show.film, name), networks.view(name)
    _, lungs = shown_input(picture, show.film.analysis.segmentation, view, AS_MADE)
    *_, last = networks.get().classifiers[name].attention_maps(torch.from_numpy(lungs.astype(np.float32))[None, None])
    assert f", and {last.min():.0%} to {last.max():.0%} at 2×2." in mask
    assert told and max(told) == 12  # three phantoms, four networks


def test_a_shadow_is_where_the_lesson_says():
    plain, mask = lesson("Nothing to find", 128).pixels, phantom_mask(128, 4)
    for name, (drawn, _) in LESSONS.items():
        change = lesson(name, 128).pixels - plain
        assert (change >= 0).all() and (change.max() > 0.05) == bool(drawn)
        inside, left = change[mask].sum(), change[:, :64].sum()  # the patient's right is on the picture's left
        share = {"lower right": 1, "upper left": 0, "both sides": 0.5, "behind the heart": 0.1}
        if "opacity" in drawn:
            place = drawn.get("place", "lower right")
            assert left / change.sum() == pytest.approx(share[place], abs=0.15)
            assert inside == (0 if place == "behind the heart" else pytest.approx(change.sum()))
        elif drawn:
            assert inside == 0 and lesson(name, 128).pixels.max() == 1
    with pytest.raises(ValueError, match="no place 'left'.*behind the heart"):
        phantom(64, place="left")
    assert {drawn["place"] for drawn, _ in LESSONS.values() if "place" in drawn} == set(PLACES) - {"lower right"}


def test_the_projector_goes_by_keys_and_buttons(desk):
    page = desk
    page.click("button:has-text('Phantoms for lessons')")
    page.click(".gallery button:has-text('The shadow elsewhere')")
    page.wait_for_selector("#read >> text=phantom, the shadow elsewhere")
    page.wait_for_selector(".readings")
    page.click("button[role=tab]:has-text('Compare attention')")
    page.focus("button:has-text('Start projector mode')")
    page.keyboard.press("Enter")
    for number, title in enumerate(SCREENS, 1):
        page.wait_for_selector(f".lecture h2:text-is('{title}')")
        page.wait_for_selector(".lecture .about")
        assert page.is_visible(f".lecture >> text={number} of 4")
        assert page.is_visible(".about >> text=synthetic phantoms, no person") == ("Grad-CAM" in title)
        screen = page.evaluate("(s => [s.scrollHeight <= s.clientHeight, s.scrollWidth <= s.clientWidth])"
                               "(document.querySelector('.lecture .screen'))")  # fmt: skip
        assert screen == [True, True], "it does not fit"
        if number == 2:
            assert _faults(page) == []
        page.keyboard.press("ArrowRight")
    page.click(".lecture >> text=Back")
    page.wait_for_selector(".lecture h2:text-is('Why accuracy lies')")
    page.select_option(".lecture select", "A letter beside the shoulder")
    page.wait_for_selector(".about >> text=the synthetic phantom “A letter beside the shoulder”")
    page.focus(".lecture .leave")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.lecture", state="hidden")
    assert page.evaluate("document.activeElement.className") == "start"
