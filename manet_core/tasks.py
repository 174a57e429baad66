"""What a network is asked: a task names the answers, and how the labels of an index map to them.

A manifest entry names its task; pipeline, page, report, evaluation and training
take classes and wording from here. `register_task` adds one from outside.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Task:
    """One question with its possible answers.

    Attributes:
        name: how manifest, command line and index refer to it.
        title: how people write it.
        classes: the answers, in the order of the logits.
        paper: where it comes from.
        limits: what a reader must know before believing an answer, in plain sentences.
        exclusive: one answer holds (softmax); False: any number of them (sigmoid).
        column: of the index that holds the label.
        labels: {label of the index: the classes, one of which it is}, for labels that are no class of this task
            themselves; a class stands for itself.
        splits: of the index that teach it.
        sources: where its training X-rays come from, as far as that misleads a network, in plain sentences.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    paper: str
    limits: str
    exclusive: bool = True
    column: str = "label"
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train",)
    sources: str = ""

    def target(self, label: str) -> np.ndarray:
        """What a cell of the index says of each class.

        Args:
            label: the cell; of tasks that are not exclusive, names joined by "|".

        Returns:
            (K,) float32. Exclusive: 1 for each class that the label allows (several: one of them, unknown which),
            0 elsewhere; all 0 where the label is none of this task's. Otherwise: 1 present, 0 absent, and NaN
            everywhere where the cell is empty, since unknown is not absent.
        """
        if self.exclusive:
            allowed = self.labels.get(label, (label,))
            return np.array([name in allowed for name in self.classes], np.float32)
        if not label:
            return np.full(len(self.classes), np.nan, np.float32)
        present = label.split("|")
        return np.array([name in present for name in self.classes], np.float32)

    def knows(self, label: str) -> bool:
        """Whether a cell of the index says anything that this task can learn from."""
        target = self.target(label)
        return bool(target.any()) if self.exclusive else not np.isnan(target).any()


_TASKS: dict[str, Task] = {}


def register_task(task: Task) -> Task:
    """Add a task; its name must be new.

    Raises:
        ValueError: there is a task of this name already.
    """
    if task.name in _TASKS:
        raise ValueError(f"There is a task {task.name!r} already.")
    _TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in _TASKS:
        raise ValueError(f"There is no task {name!r}; choose one of: {', '.join(_TASKS)}.")
    return _TASKS[name]


def list_tasks() -> list[str]:
    """The names of all tasks."""
    return list(_TASKS)


_GERMS = ("Bacterial pneumonia", "Viral pneumonia")

MANET = register_task(
    Task(
        name="manet",
        title="Five classes",
        classes=("Normal", "COVID-19", "Tuberculosis", *_GERMS),
        paper="Xu, Lam, Jia: MANet. Neurocomputing 443 (2021)",
        limits=(
            "The five probabilities of a network sum to 100%: it must choose among five answers. Effusion, "
            "pneumothorax, nodules, heart failure and all else are not among them, and a high “Normal” does not rule "
            "them out."
        ),
        sources=(
            "The training X-rays tie each class to its source: bacterial and viral pneumonia come from children, "
            "tuberculosis and COVID-19 from adults of other hospitals. A high number may thus reflect the age or the "
            "hospital."
        ),
        labels={"Pneumonia (unspecified)": _GERMS},
    )
)
GUIDED = register_task(
    Task(
        name="guided",
        title="Normal, pneumonia or COVID-19",
        classes=("Normal", "Pneumonia", "COVID-19"),
        paper="Danilov et al.: Indirect supervision applied to COVID-19 and pneumonia classification (2022)",
        limits=(
            "The three probabilities of a network sum to 100%: it must choose among three answers. Tuberculosis, "
            "effusion, pneumothorax, nodules, heart failure and all else are not among them."
        ),
        sources=(
            "The training X-rays tie each class to its source: pneumonia comes mostly from children of one hospital, "
            "COVID-19 from adults of other hospitals. A high number may thus reflect the age or the hospital."
        ),
        labels={name: ("Pneumonia",) for name in (*_GERMS, "Pneumonia (unspecified)")},
    )
)
COVID = register_task(
    Task(
        name="covid",
        title="COVID-19 or normal",
        classes=("Normal", "COVID-19"),
        paper="Li, Ma, Yan (2021), AlexNet with attention",
        limits=(
            "A network knows two answers only: every other disease is called one of them. A network of this task must "
            "not be asked about a patient who may have anything else."
        ),
        sources=(
            "As in the paper, the training X-rays of each class come from a source of their own. A high number may "
            "thus reflect the source alone."
        ),
    )
)
NIH14 = register_task(
    Task(
        name="nih14",
        title="14 findings",
        classes=(
            "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia",
            "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax",
        ),
        paper="Wang et al.: ChestX-ray8. CVPR 2017",
        limits=(
            "Each finding has a probability of its own; they do not sum to 100%. The labels were mined from reports by "
            "a program, and about one in ten is wrong."
        ),
        exclusive=False,
        column="findings",
        splits=("train", "pretrain"),
    )
)  # fmt: skip
CLASSES = MANET.classes
