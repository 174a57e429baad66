"""Teaching: a lecturer's case list, the screens of the projector, the phantoms of the lessons."""

import csv
import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import behind_shipped_segmenter, expect, served
from PIL import Image

import app
from manet_core.phantom import phantom
from manet_core.tasks import get_task
from ui import cases
from ui.cases import CasesError, asked_task, load_cases

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
    monkeypatch.setattr(app, "serve", lambda *_: pytest.fail("the page was started"))
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
def lecture(random_weights, weights, films, tmp_path_factory):
    """The page with a case list."""
    _list(films, f"file,answer,note\nviral.png,Viral pneumonia,<b>From</b> day 3\nmore/tb.png,Tuberculosis,{FORMULA}")
    folder = behind_shipped_segmenter(random_weights, weights, tmp_path_factory.mktemp("weights"))
    with served(folder, tmp_path_factory.mktemp("server"), "--cases", str(films)) as url_and_uploads:
        yield url_and_uploads


def test_a_student_reads_the_list_film_by_film(lecture, films, page):
    url, uploads = lecture
    before = {path: path.stat().st_mtime for path in films.rglob("*")}
    page.goto(url)
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
    page.fill("#student input, #student textarea", "=Erika")
    with page.expect_download() as download:
        page.click("button:has-text('Save my answers as CSV')")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"))))
    assert [(row["case"], row["right"]) for row in rows] == [("1", "yes"), ("2", "no")]
    assert {row["student"] for row in rows} == {"'=Erika"}
    assert {path: path.stat().st_mtime for path in films.rglob("*")} == before
    assert not [path for path in uploads.rglob("*") if path.is_file()]
    page.reload()  # the answers were the session's
    page.wait_for_selector("button:has-text('Show case 1')")
    assert not page.is_visible("#score table")
