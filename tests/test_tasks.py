"""What a network is asked, and what a cell of the index says to it."""

import numpy as np
import pytest
from conftest import make_weights

from manet_core import CLASSES, Pipeline, list_tasks, tasks
from manet_core.phantom import phantom
from manet_core.report import save_report
from manet_core.tasks import Task, get_task, register_task


def said(task: str, label: str) -> list[str]:
    target = get_task(task).target(label)
    return [name for name, value in zip(get_task(task).classes, target) if value == 1]


def test_the_four_tasks_and_their_classes():
    assert list_tasks()[:4] == ["manet", "guided", "covid", "nih14"]
    assert CLASSES == get_task("manet").classes
    assert CLASSES == ("Normal", "COVID-19", "Tuberculosis", "Bacterial pneumonia", "Viral pneumonia")
    assert get_task("guided").classes == ("Normal", "Pneumonia", "COVID-19")
    assert get_task("covid").classes == ("Normal", "COVID-19")
    assert len(get_task("nih14").classes) == 14 and not get_task("nih14").exclusive


def test_labels_say_what_they_allow():
    both = ["Bacterial pneumonia", "Viral pneumonia"]
    assert said("manet", "Pneumonia (unspecified)") == both and said("manet", both[0]) == both[:1]
    assert said("guided", both[1]) == said("guided", "Pneumonia (unspecified)") == ["Pneumonia"]
    assert said("covid", "COVID-19") == ["COVID-19"]
    for task, label in (("manet", "Other finding"), ("guided", "Tuberculosis"), ("covid", both[0])):
        assert said(task, label) == [] and not get_task(task).knows(label)


def test_an_unknown_finding_is_not_an_absent_one():
    task = get_task("nih14")
    assert said("nih14", "Effusion|Mass") == ["Effusion", "Mass"] and task.knows("Effusion|Mass")
    assert task.target("No Finding").tolist() == [0] * 14 and task.knows("No Finding")
    assert np.isnan(task.target("")).all() and not task.knows("")


def test_an_unknown_task_is_told_what_there_is():
    with pytest.raises(ValueError, match="choose one of: manet, guided, covid, nih14"):
        get_task("lungs")


def test_a_task_from_outside(monkeypatch, tmp_path):
    """One registry row, and its networks go through pipeline and report."""
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))
    task = register_task(Task("side", "Which side?", ("Left", "Right"), "Nobody (2020)", "Two answers only."))
    with pytest.raises(ValueError, match="already"):
        register_task(task)
    pipe = Pipeline.load(make_weights(tmp_path, {"efficientnet_lite0": "side"}))
    analysis = pipe.analyze(phantom(96))
    reading = analysis.readings["efficientnet_lite0"]
    assert list(reading.probabilities) == ["Left", "Right"] and reading.task == "side"
    assert sum(reading.probabilities.values()) == pytest.approx(1)
    assert set(analysis.votes_of("side")) <= {"Left", "Right"}
    save_report(analysis, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
