"""The one-page report."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.table import Table
from matplotlib.text import Text
from PIL import Image

from manet_core import Pipeline
from manet_core.lungs import Lungs
from manet_core.phantom import phantom, phantom_mask
from manet_core.report import limits, save_report


@pytest.fixture(scope="module")
def pipe(random_weights):
    return Pipeline.load(random_weights)


def test_pdf_is_one_page_of_a4_without_a_name(pipe, tmp_path):
    path = tmp_path / "report.pdf"
    save_report(pipe.analyze(phantom(128)), path, hashes=pipe.hashes)
    data = path.read_bytes()
    assert data.startswith(b"%PDF") and data.count(b"/Type /Page ") + data.count(b"/Type /Page\n") == 1
    assert b"/MediaBox [ 0 0 595.44 841.68 ]" in data and b"/Author" not in data


@pytest.mark.parametrize("models", [[], ["efficientnet_lite0_ma"], None], ids=["mask alone", "one", "all"])
def test_png_has_a4_proportions_whatever_was_asked(pipe, tmp_path, models):
    path = tmp_path / "report.png"
    save_report(pipe.analyze(phantom(128), models), path)
    picture = Image.open(path)
    assert picture.height / picture.width == pytest.approx(2**0.5, rel=0.01)
    assert np.asarray(picture.convert("L")).std() > 20


def test_networks_of_many_tasks_share_a_page(many_tasks, tmp_path):
    pipe = Pipeline.load(many_tasks)
    path = tmp_path / "report.pdf"
    save_report(pipe.analyze(phantom(128)), path, hashes=pipe.hashes)
    assert path.read_bytes().count(b"/Type /Page ") + path.read_bytes().count(b"/Type /Page\n") == 1
    said = limits(["manet", "nih14"])
    assert "five probabilities" in said and "come from children" in said and "do not sum to 100%" in said
    assert limits([]).startswith("A heatmap shows")


def test_the_mean_stands_below_several_networks(pipe, tmp_path, monkeypatch):
    tables = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: tables.extend(self.findobj(Table)))
    analysis = pipe.analyze(phantom(128))
    save_report(analysis, tmp_path / "a.png")
    save_report(pipe.analyze(phantom(128), list(analysis.readings)[:1]), tmp_path / "a.png")
    many, one = ({at: cell.get_text().get_text() for at, cell in drawn.get_celld().items()} for drawn in tables)
    last, mean = len(analysis.readings) + 1, analysis.mean_of("manet")
    assert [many[last, column] for column in range(6)] == ["mean", *(f"{p:.1%}" for p in mean.values())]
    assert many[1, 0] == one[1, 0] == next(iter(analysis.readings)) and "mean" not in one.values()


def test_a_page_without_heatmaps(many_tasks, tmp_path):
    (analysis,) = Pipeline.load(many_tasks).analyze_many([phantom(128)], heatmaps=False)
    save_report(analysis, tmp_path / "report.png")
    assert Image.open(tmp_path / "report.png").height > 1000


def test_title_and_note_are_printed(pipe, tmp_path):
    analysis, pages = pipe.analyze(phantom(128), []), []
    for note in ("", "Compare with last year. " * 20):
        save_report(analysis, tmp_path / "a.png", note=note)
        pages.append(np.asarray(Image.open(tmp_path / "a.png").convert("L")))
    top = slice(60, 90)  # below the heading
    assert (pages[0][top] == 255).all() and (pages[1][top] < 128).sum() > 500


@pytest.mark.parametrize("title", ["a$\\frac$.png", "胸部.png", "bytes\udc80 \x1b and \n lines"])
def test_a_title_is_text_whatever_it_holds(pipe, tmp_path, title):
    analysis = pipe.analyze(phantom(128), [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_report(analysis, tmp_path / "a.png", title=title, note=title)
    assert (np.asarray(Image.open(tmp_path / "a.png").convert("L"))[60:90] < 128).sum() > 100


def test_networks_that_disagree_name_no_class(pipe, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: said.extend(self.findobj(Text)))
    mask = phantom_mask(64)
    analysis = pipe.analyze(phantom(128), lungs=Lungs(mask.astype(np.float32), mask))
    names = dict(zip(analysis.readings, ["Normal", *["Tuberculosis"] * 9]))
    others = {model: replace(analysis.readings[model], predicted=name) for model, name in names.items()}
    save_report(replace(analysis, readings=others), tmp_path / "a.png")
    (told,) = [text.get_text() for text in said if "disagree" in text.get_text()]
    assert told.startswith("Predicted: no reliable reading") and f"Normal by 1 of {len(names)}" in told
    said.clear()
    same = {m: replace(r, predicted="Normal", operating_point=1.0) for m, r in analysis.readings.items()}
    save_report(replace(analysis, readings=same), tmp_path / "a.png")
    (told,) = [text.get_text() for text in said if "sure enough" in text.get_text()]
    assert told.startswith("Predicted: no reliable reading: not sure enough (Normal")


def test_no_class_is_named_where_it_is_withheld(pipe, tmp_path, monkeypatch):
    nothing, said = np.zeros((64, 64), bool), []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: said.extend(self.findobj(Text)))
    for mask in (nothing, ~nothing):
        said.clear()
        analysis = pipe.analyze(phantom(128), lungs=Lungs(mask.astype(np.float32), mask))
        save_report(analysis, tmp_path / "a.png")
        predicted = next(text.get_text() for text in said if text.get_text().startswith("Predicted"))
        bold = [text.get_text() for text in said if text.get_weight() == "bold" and "%" in text.get_text()]
        named = next(iter(analysis.votes)) in predicted
        assert ("no reliable reading" in predicted) == (not analysis.reliable) == (not named) == (not bold)
        if not mask.any():
            assert not analysis.reliable
