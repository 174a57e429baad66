"""What decides the weights that a training ends with, and what does not.

A `Recipe` holds every setting that decides what is learnt; a `Run`, where the
data lie and what computes. Options of the command line, the list of departures
from the paper, the comparison of trainings and the benchmark are all made of
the recipe's fields.
"""

import argparse
import os
from dataclasses import asdict, dataclass, field, fields, replace

from manet_core.networks.registry import list_models, spec
from manet_core.preprocess import SEES

AUGMENTATIONS = ("paper", "flip", "robust", "style", "masks", "broad")


def setting(default, help: str, choices: tuple | None = None, paper: bool = True):
    """A field with the help and the choices of its option; `paper`: whether the paper says anything of it."""
    return field(default=default, metadata={"help": help, "choices": choices, "paper": paper})


@dataclass(frozen=True)
class Recipe:
    """Every setting that decides what is learnt. The defaults are the paper's for a classifier (MANet, section 3.2)."""

    task: str = setting("manet", "what is learnt: a task of manet_core, or segment", paper=False)
    model: str = setting("resnet34_ma", "network, by its registered name", paper=False)
    size: int = setting(512, "side of the network's square input, pixels")
    epochs: int = setting(200, "passes over the training X-rays")
    batch: int = setting(64, "X-rays a step, shared by all GPUs")
    optimizer: str = setting("sgd", "how the weights are moved", ("sgd", "adam", "adamw"))
    lr: float = setting(0.01, "peak learning rate")
    weight_decay: float = setting(0.0, "decay of the weights", paper=False)
    schedule: str = setting("cosine", "of the learning rate", ("constant", "cosine", "onecycle"))
    init: str | None = setting(None, "weights to start from (.safetensors); tensors of another shape are skipped")
    imagenet: bool = setting(False, "start from ImageNet weights")
    augment: str = setting(
        "paper",
        "robust: also tone, resolution, JPEG, noise; style: also other sources' looks; masks: other masks; broad: "
        "all of these, drawn on the device a batch at a time; flip: rotation and reflection alone",
        AUGMENTATIONS,
    )
    balance: float = setting(0.0, "1: each source of a class equally often; 0: each X-ray equally often")
    balance_classes: bool = setting(False, "each label equally often; a pneumonia without a germ is one of its own")
    label_smoothing: float = setting(0.0, "share of the target that is spread over all classes")
    ema: float = setting(0.0, "decay a step of the moving average of weights that is kept; 0: the last weights")
    select: str = setting(
        "accuracy", "validation figure whose best value, the lowest of val_loss, chooses the epoch that is kept"
    )
    patience: int = setting(0, "end after so many epochs without a better one; 0: never")
    working: int | None = setting(None, "side to which each X-ray is brought before the lungs' box is cut out, pixels")
    crop: float | None = setting(None, "cut out the lungs' box, enlarged by this share of its sides")
    sees: str = setting("lungs", "what is shown; all but what the network is made for are controls", SEES)
    sources: str | None = setting(None, "only X-rays of these sources, joined by commas", paper=False)
    findings: float = setting(
        0.0, "share of the draws that are X-rays with known findings, learnt as further outputs that are then dropped"
    )
    split: str = setting("patient", "what training and test do not share", ("patient", "image"), paper=False)
    width: int = setting(32, "segmenter: channels of the first level", paper=False)
    conventions: int = setting(1, "segmenter: outputs, one for each convention of the annotators (1 or 2)")
    seed: int = setting(0, "of the initial weights and of every draw", paper=False)
    precision: str = setting(
        "auto", "autocast type; auto: bf16 where the device has it, no: float32", ("auto", "bf16", "no"), paper=False
    )

    @classmethod
    def of(cls, settings: dict) -> "Recipe":
        """The recipe of a finished training's settings; what an older version did not know has its default."""
        known = {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
        if known.get("task") == "classify":  # before there were tasks
            known["task"] = "manet"
        segments = known.get("task") == "segment" or "model" not in known
        return replace(PAPER["segment" if segments else "classify"], **known)

    @property
    def verb(self) -> str:
        """Which training follows it: "segment" or "classify"."""
        return "segment" if self.task == "segment" else "classify"

    @property
    def paper(self) -> "Recipe":
        """The recipe of the paper that the network is from."""
        if self.verb == "segment":
            return PAPER["segment"]
        if self.model not in list_models():  # what several networks have in common names none of them
            return PAPER["classify"]
        row = spec(self.model)
        return PAPER.get(row.attention) or PAPER.get(row.backbone, PAPER["classify"])

    def departures(self) -> dict[str, dict]:
        """Where it differs from its paper's recipe: {setting: {"paper", "here"}}."""
        paper = asdict(self.paper)
        return {
            f.name: {"paper": paper[f.name], "here": here}
            for f in fields(self)
            if f.metadata["paper"] and (here := getattr(self, f.name)) != paper[f.name]
        }

    def shared(self) -> dict:
        """What two trainings must have in common for their networks to be compared: all but network, start and seed."""
        return {k: v for k, v in asdict(self).items() if k not in ("model", "seed", "init")}


@dataclass(frozen=True)
class Run:
    """Where a training reads and writes and what computes it; none of this decides what is learnt.

    Attributes:
        data: folder with index.csv or shards, or an address of fsspec.
        out: folder for weights, checkpoint and log; the same command resumes.
        cache: folder for decoded pictures.
        weights: folder or manifest with the segmenter's weights.
        device: "auto" (CUDA when present) or "cpu".
        workers: loader processes.
        compile: whether torch.compile is used.
    """

    data: str
    out: str = ""
    cache: str = "runs/cache"
    weights: str = "weights"
    device: str = "auto"
    workers: int = 0
    compile: bool = False


PAPER = {
    "segment": Recipe(
        task="segment", model="resunet", epochs=50, optimizer="adam", lr=2e-4, weight_decay=1e-5, schedule="constant",
        select="iou",
    ),
    "classify": Recipe(),
    "alexnet": Recipe(
        task="covid", model="alexnet_attn2", size=299, epochs=60, optimizer="adam", lr=1e-4, schedule="constant",
        augment="flip", sees="whole",
    ),
    "guided": Recipe(
        task="guided", model="vgg16_guided", size=224, batch=32, lr=1e-4, weight_decay=1e-3, schedule="constant",
        imagenet=True, select="val_loss", patience=10, sees="whole",
    ),
}  # fmt: skip
_LAPTOP = dict(size=224, batch=32, optimizer="adamw", weight_decay=0.05, schedule="onecycle", imagenet=True)
_BROAD = dict(
    size=224, working=256, crop=0.05, epochs=20, batch=128, optimizer="adamw", lr=1e-3, weight_decay=0.05,
    schedule="onecycle", augment="broad", balance=0.5, balance_classes=True, label_smoothing=0.05, ema=0.99,
    select="group_sensitivity",
)  # fmt: skip
RECIPES = {
    "segment": {
        "paper": PAPER["segment"],
        "laptop": replace(
            PAPER["segment"], size=224, epochs=20, batch=16, lr=5e-4, schedule="onecycle", balance=0.75, width=16
        ),
        "broad": replace(
            PAPER["segment"], size=256, epochs=30, batch=64, optimizer="adamw", lr=2e-3, schedule="onecycle",
            augment="broad", balance=0.5, width=16, conventions=2,
        ),
    },
    "classify": {
        "paper": PAPER["classify"],
        "laptop": replace(PAPER["classify"], model="efficientnet_lite0_ma", epochs=3, lr=1e-3, **_LAPTOP),
        "broad": replace(PAPER["classify"], model="efficientnet_lite0_ma", **_BROAD),
        "alexnet": PAPER["alexnet"],
        "guided": PAPER["guided"],
    },
}  # fmt: skip


_UNKNOWN_TO = {  # settings that a verb does not have
    "segment": ("task", "model", "split", "sees", "sources", "crop", "working", "imagenet", "label_smoothing",
                "balance_classes", "findings"),
    "classify": ("width", "conventions"),
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser, verb: str, leave_out: tuple[str, ...] = ()) -> None:
    """`--recipe` and one option for every setting of a "classify" or "segment" training, save those left out."""
    parser.add_argument("--recipe", choices=RECIPES[verb], default="paper", help="settings to begin with")
    group = parser.add_argument_group("recipe", "single settings, which override those of --recipe")
    for f in fields(Recipe):
        if f.name in (*leave_out, *_UNKNOWN_TO[verb]):
            continue
        option, default = "--" + f.name.replace("_", "-"), getattr(PAPER[verb], f.name)
        text = f"{f.metadata['help']} (the paper's recipe: {default})".replace("%", "%%")
        if isinstance(f.default, bool):
            group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            kind = {"working": int, "crop": float, "init": str, "sources": str}.get(f.name, type(f.default))
            group.add_argument(option, type=kind, choices=f.metadata["choices"], help=text)


def recipe_from(args: argparse.Namespace, verb: str) -> Recipe:
    """The recipe that the options of `add_options` describe."""
    given = {f.name: value for f in fields(Recipe) if (value := getattr(args, f.name, None)) is not None}
    return replace(RECIPES[verb][args.recipe], **given)


def add_run_options(parser: argparse.ArgumentParser, out: bool = True) -> None:
    """The options of a `Run`."""
    group = parser.add_argument_group("run", "where it reads and writes, and what computes it")
    group.add_argument(
        "--data", default=os.environ.get("MANET_DATA", "data"), help="folder with index.csv or shards; also MANET_DATA"
    )
    if out:
        group.add_argument("--out", required=True, help="folder for weights, checkpoint and log; resumes if it exists")
    group.add_argument("--cache", default=Run.cache, help="folder for decoded pictures")
    group.add_argument("--weights", default=Run.weights, help="folder or manifest with the segmenter's weights")
    group.add_argument("--device", choices=["auto", "cpu"], default=Run.device, help="auto: CUDA when present")
    group.add_argument("--workers", type=int, default=Run.workers, help="loader processes")
    group.add_argument("--compile", action="store_true", help="torch.compile: a minute's wait, then a fifth faster")


def run_from(args: argparse.Namespace) -> Run:
    """The run that the options of `add_run_options` describe."""
    return Run(**{f.name: getattr(args, f.name) for f in fields(Run) if hasattr(args, f.name)})
