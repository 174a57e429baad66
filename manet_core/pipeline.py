"""X-ray in, second opinion out: masks, readings, heatmaps, warnings."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .ahead import ahead
from .explain import DEFAULT, Explainer, get_explainer
from .explain.gradcam import scale_maps
from .explain.progress import watched
from .familiarity import Familiarity
from .files.dicom import HEADER_DENIES
from .files.quality import picture_warnings
from .files.xray import XRay, XRayError, load_xray
from .lungs import Lungs, implausible, mask_warnings, predict_lungs, sides
from .networks import runtime
from .networks.registry import list_models
from .pose import FAULTS, Pose
from .preprocess import WHOLE, Box, View, network_input, paste, resize
from .tasks import get_task, list_tasks
from .weights import (
    SEGMENT,
    WeightsError,
    fingerprint,
    load_network,
    operating_point_of,
    read_manifest,
    task_of,
    temperature_of,
)

DISCLAIMER = "Research and teaching only, not a medical device."
NO_READING = "no reliable reading"  # what is said in a class's place where an analysis withholds it
SEGMENTER = "resunet"
Progress = Callable[[float, int], None]  # (networks that are done, how many there are)
Source = XRay | str | Path | bytes | Callable[[], XRay]  # an X-ray, what `load_xray` reads, or what reads one


@dataclass(frozen=True, repr=False)
class Reading:
    """What one classifier says of one X-ray.

    Attributes:
        probabilities: {class: float}; of an exclusive task they sum to 1.
        predicted: the class of the highest probability.
        heatmaps: {class: (S, S) float32 in [0, 1]}, each min–max scaled on its own, at the network's input size:
            they cover `box`. {} if none were asked for.
        peaks: {class: float}, each map's raw maximum before scaling.
        in_lung: {class: float in [0, 1]}, the share of the heatmap's mass inside
            the cleaned mask; NaN-free: 0 for an empty heatmap.
        native: (h, w) of the maps before they are enlarged, the resolution that a heatmap really has.
        in_sides: {class: (right, left)}, `in_lung` by the patient's right and left lung.
        task: what the network is asked; see `tasks`.
        box: the part of the X-ray that the network was shown, (top, left, bottom, right) as shares of height and width.
        operating_point: the probability from which on `predicted` may be claimed; see `weights.operating_point_of`.
    """

    probabilities: dict[str, float]
    predicted: str
    heatmaps: dict[str, np.ndarray]
    peaks: dict[str, float]
    in_lung: dict[str, float]
    native: tuple[int, int]
    in_sides: dict[str, tuple[float, float]]
    task: str
    box: Box = WHOLE
    operating_point: float = 0.0

    @property
    def sure(self) -> bool:
        """Whether the probability of `predicted` reaches the network's operating point."""
        return self.probabilities[self.predicted] >= self.operating_point

    @property
    def present(self) -> list[str]:
        """The classes that the network holds for true: `predicted` of an exclusive task, otherwise all from 50% on."""
        if get_task(self.task).exclusive:
            return [self.predicted]
        return [name for name, probability in self.probabilities.items() if probability >= 0.5]

    def heatmap_at(self, name: str, shape: tuple[int, int]) -> np.ndarray:
        """The heatmap of class `name` on the whole X-ray of (H, W) pixels, float32 in [0, 1]; 0 outside of `box`.

        Raises:
            KeyError: there is no such heatmap.
        """
        if name not in self.heatmaps:
            raise KeyError(f"There is no heatmap of {name!r}; there are: {', '.join(self.heatmaps) or 'none'}.")
        return paste(self.heatmaps[name], self.box, shape)

    def __repr__(self) -> str:
        return f"Reading({self.task}: {self.predicted} {self.probabilities[self.predicted]:.0%})"


@dataclass(frozen=True, repr=False)
class Analysis:
    """One X-ray, analysed. The four pictures have the X-ray's own (H, W).

    Attributes:
        original: (H, W) float32 in [0, 1].
        segmentation: the predicted and the cleaned mask at the segmenter's size.
        readings: {model: Reading}.
        warnings: plain sentences; [] when all is well.
        distance: how unlike the training X-rays it is, about 1 for one of them; None if the weights cannot tell.
        explainer: what made the heatmaps; see `explain`.
        withheld: those of the warnings for which no class should be named: the picture, its header or its mask says
            that it is no upright frontal chest X-ray, or it is out-of-distribution; [] when the readings may be shown.
        fault: how the film is presented wrongly, one of `pose.FAULTS`, which `pose.mended` puts right; None if it is
            not, or the weights cannot tell.
    """

    original: np.ndarray
    segmentation: Lungs
    readings: dict[str, Reading]
    warnings: list[str]
    distance: float | None = None
    explainer: str = DEFAULT
    withheld: list[str] = field(default_factory=list)
    fault: str | None = None

    @cached_property
    def mask_raw(self) -> np.ndarray:
        """The mask as predicted, (H, W) bool."""
        return self.segmentation.raw_at(self.original.shape)

    @cached_property
    def mask(self) -> np.ndarray:
        """The mask with holes filled and small objects removed, (H, W) bool."""
        return self.segmentation.at(self.original.shape)

    @property
    def lungs(self) -> np.ndarray:
        """The segmented lungs, original × mask, (H, W) float32 in [0, 1]."""
        return self.original * self.mask

    @property
    def tasks(self) -> list[str]:
        """The tasks of the networks that were asked, in the order of `list_tasks`."""
        asked = {reading.task for reading in self.readings.values()}
        return [task for task in list_tasks() if task in asked]

    @property
    def reliable(self) -> bool:
        """Whether the readings may be shown: nothing is `withheld`. It does not say that they are right."""
        return not self.withheld

    def readings_of(self, task: str) -> dict[str, Reading]:
        """The readings of one task, {model: Reading}: only these can be compared, or agree."""
        return {model: reading for model, reading in self.readings.items() if reading.task == task}

    def votes_of(self, task: str) -> dict[str, int]:
        """{class: number of the task's networks that hold it for true}, the most first."""
        readings = self.readings_of(task).values()
        return dict(Counter(name for reading in readings for name in reading.present).most_common())

    def mean_of(self, task: str) -> dict[str, float]:
        """{class: mean of the probabilities that the task's networks give it}; {} if none of them was asked.

        Where one class holds they sum to 1. The networks are an ensemble (Lakshminarayanan 2017).
        """
        readings = self.readings_of(task).values()
        names = get_task(task).classes if readings else ()
        return {name: sum(reading.probabilities[name] for reading in readings) / len(readings) for name in names}

    def leading_of(self, task: str) -> list[str]:
        """The classes that most of the task's networks hold for true: one, several if they tie, or none."""
        votes = self.votes_of(task)
        return [name for name, count in votes.items() if count == max(votes.values())]

    def divided_of(self, task: str) -> bool:
        """Whether the networks of a task of which one class holds name more than one."""
        return get_task(task).exclusive and len(self.votes_of(task)) > 1

    def unsure_of(self, task: str) -> bool:
        """Whether the networks of a task of which one class holds all name it, but not all of them surely enough."""
        readings = self.readings_of(task).values()
        return get_task(task).exclusive and not self.divided_of(task) and not all(r.sure for r in readings)

    def doubtful_of(self, task: str) -> bool:
        """Whether the networks of a task claim nothing together: they are divided, or not sure."""
        return self.divided_of(task) or self.unsure_of(task)

    def claim_of(self, task: str) -> list[str] | None:
        """What may be said for all networks of a task together.

        Returns:
            The class that all of them name, each of them surely enough (`Reading.sure`); of findings, those that at
            least half of them hold for true, or [] for none. None where nothing may be said: the readings are withheld,
            or the networks are divided or not sure.
        """
        if not self.reliable or self.doubtful_of(task):
            return None
        asked = len(self.readings_of(task))
        return [name for name, count in self.votes_of(task).items() if 2 * count >= asked]

    @property
    def votes(self) -> dict[str, int]:
        """`votes_of` the first of `tasks`; {} if no network was asked."""
        return self.votes_of(self.tasks[0]) if self.tasks else {}

    @property
    def leading(self) -> list[str]:
        """`leading_of` the first of `tasks`; [] if no network was asked."""
        return self.leading_of(self.tasks[0]) if self.tasks else []

    def heatmap(self, model: str, name: str, shape: tuple[int, int] | None = None) -> np.ndarray:
        """The heatmap of class `name` by `model` on the whole X-ray, float32 in [0, 1].

        Args:
            model: that read this X-ray.
            name: of a class.
            shape: (height, width) of the picture to lay it over; the X-ray's own unless given.

        Raises:
            KeyError: `model` did not read this X-ray, or there is no such class.
        """
        if model not in self.readings:
            raise KeyError(f"{model!r} did not read this X-ray; these did: {', '.join(self.readings) or 'none'}.")
        return self.readings[model].heatmap_at(name, self.original.shape if shape is None else shape)

    def to_dict(self) -> dict:
        """The result without pixels and without anything about the patient, ready for JSON."""
        areas = [float(side.mean()) for side in sides(self.segmentation.cleaned)]
        return {
            "readings": {
                model: {
                    "task": reading.task,
                    "probabilities": reading.probabilities,
                    "predicted": reading.predicted,
                    "operating_point": reading.operating_point,
                    "in_lung": reading.in_lung,
                }
                for model, reading in self.readings.items()
            },
            "claims": {task: self.claim_of(task) for task in self.tasks},
            "means": {task: self.mean_of(task) for task in self.tasks},
            "explainer": self.explainer,
            "lung_area": float(self.segmentation.cleaned.mean()),
            "lung_areas": dict(zip(("right", "left"), areas)),
            "height": self.original.shape[0],
            "width": self.original.shape[1],
            "distance": self.distance,
            "pose": self.fault,
            "reliable": self.reliable,
            "withheld": list(self.withheld),
            "warnings": list(self.warnings),
            "disclaimer": DISCLAIMER,
        }

    def __repr__(self) -> str:
        height, width = self.original.shape
        said = [f"{model} {r.predicted} {r.probabilities[r.predicted]:.0%}" for model, r in self.readings.items()]
        said = ", ".join(said) if self.reliable else NO_READING
        return f"Analysis({height} × {width}: {said or 'mask alone'}; {len(self.warnings)} warnings)"


@dataclass(frozen=True)
class Shown:
    """What a classifier is shown, (S, S) float32 in [−1, 1]; the mask of both lungs, of each, (S, S) bool; the box."""

    seen: np.ndarray
    mask: np.ndarray
    right: np.ndarray
    left: np.ndarray
    box: Box


class Pipeline:
    """The networks, loaded once; `analyze` may be called again and again.

    Example:
        >>> from manet_core import Pipeline
        >>> from manet_core.phantom import phantom
        >>> pipe = Pipeline.load(models=["efficientnet_lite0_ma"])
        >>> reading = pipe.analyze(phantom(seed=0)).readings["efficientnet_lite0_ma"]
        >>> round(sum(reading.probabilities.values()), 6)
        1.0
    """

    def __init__(
        self,
        segmenter: nn.Module,
        classifiers: dict[str, nn.Module],
        entries: dict[str, dict],
        familiarity: Familiarity | None = None,
        pose: Pose | None = None,
    ):
        self.segmenter, self.classifiers, self.entries = segmenter, classifiers, entries
        self.familiarity, self.pose = familiarity, pose

    @classmethod
    def load(cls, weights: str | Path = "weights", models: list[str] | None = None, device: str = "auto") -> "Pipeline":
        """Load the segmenter and `models` (None: all classifiers of the manifest) from a set of weights.

        Args:
            weights: folder with manifest.json, or a manifest file.
            models: names of classifiers; [] for the mask alone.
            device: "auto" (CUDA when present), "cpu", "cuda", "cuda:1", ...

        Raises:
            WeightsError: weights are missing, damaged or without a temperature, or there is no such device.
        """
        entries = read_manifest(weights)
        if models is None:
            models = _classifiers(entries)
        device = _device(device)
        segmenter = load_network(weights, SEGMENTER, device)
        classifiers = {name: load_network(weights, name, device) for name in models}
        for name in models:
            temperature_of(name, entries[name])
        segmented = entries[SEGMENTER]
        return cls(segmenter, classifiers, entries, Familiarity.load(weights, segmented), Pose.load(weights, segmented))

    @property
    def models(self) -> list[str]:
        """Names of the loaded classifiers."""
        return list(self.classifiers)

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(self.models) or 'mask alone'}; on {self.device})"

    @property
    def hashes(self) -> dict[str, str]:
        """{model: SHA-256 of its weights} of the loaded classifiers; see `weights.fingerprint`."""
        return {name: fingerprint(self.entries[name]) for name in self.classifiers}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.segmenter.parameters()).device

    def analyze(
        self,
        x: XRay | str | Path | bytes,
        models: list[str] | None = None,
        lungs: Lungs | None = None,
        sees: str | None = None,
        explainer: str = DEFAULT,
        progress: Progress | None = None,
    ) -> Analysis:
        """Mask, clean, classify and explain one X-ray.

        Args:
            x: from `load_xray`, or what that reads.
            models: loaded names to ask; None: all; []: stop after the mask.
            lungs: a mask to use in place of the predicted one, for "what if".
            sees: what the classifiers are shown, one of `preprocess.SEES`, for "what if"; None: what each is made for.
            explainer: what makes the heatmaps, one of `explain.list_explainers()`.
            progress: called with the networks that are done, whole or in part, and how many there are.

        Raises:
            WeightsError: a model that is not loaded.
            XRayError: `x` is a file that cannot be read.
            ValueError: there is no such `sees` or `explainer`, or it does not suit one of the models.
        """
        (analysis,) = self._analyze([_read(x)], self._names(models), get_explainer(explainer), [lungs], sees, progress)
        return analysis

    def analyze_many(
        self,
        xrays: Iterable[Source],
        models: list[str] | None = None,
        batch: int = 16,
        heatmaps: bool = True,
        sees: str | None = None,
        explainer: str = DEFAULT,
        return_exceptions: bool = False,
    ) -> Iterator[Analysis | Exception]:
        """Analyse many X-rays, in order; files are read while the networks work on those before them.

        On a CPU each core works on an X-ray of its own: there, several X-rays that go through a network together
        take no less time than one after another. On a GPU each network sees a whole batch at once.

        Args:
            xrays: as many as you like, from `load_xray`, what that reads, or functions that return one, which are
                called in other threads. A few more than there are cores are held in memory; on a GPU three batches.
            models: as `analyze` has it.
            batch: how many X-rays go through a network together on a GPU.
            heatmaps: False: none are made, which is faster; `heatmaps`, `peaks`, `in_lung`, `in_sides` are then {}.
            sees: as `analyze` has it.
            explainer: as `analyze` has it.
            return_exceptions: an X-ray that cannot be read or analysed has its exception in the place of its
                analysis, and costs no other its own: `XRayError`, or whatever went wrong with the analysis. False:
                it is raised when its turn comes.

        Raises:
            WeightsError: a model that is not loaded.
            XRayError: one of `xrays` is a file that cannot be read.
            ValueError: there is no such `sees` or `explainer`, or it does not suit one of the models.
        """
        names, chosen = self._names(models), get_explainer(explainer) if heatmaps else None
        if chosen is not None:
            self.check_suits(chosen, names)

        def analyze(read: list[XRay | Exception]) -> list[Analysis | Exception]:
            good = [x for x in read if isinstance(x, XRay)]
            found = iter(self._analyze_each(good, names, chosen, sees))
            return [next(found) if isinstance(x, XRay) else x for x in read]

        if _alone(self.device):
            several = ahead(lambda x: analyze([_try_to_read(x)]), xrays, torch.get_num_threads())
        else:
            read = ahead(_try_to_read, xrays, torch.get_num_threads(), 2 * batch)
            several = ahead(analyze, iter(lambda: list(islice(read, batch)), []), 1, 1)
        return _each(several, return_exceptions)

    def _analyze_each(
        self, xrays: list[XRay], names: list[str], explainer: Explainer | None, sees: str | None
    ) -> list[Analysis | Exception]:
        """The analyses; if they fail together, one by one, so that one bad X-ray costs no other its result."""
        try:
            return self._analyze(xrays, names, explainer, [None] * len(xrays), sees) if xrays else []
        except Exception as error:
            if len(xrays) == 1:
                return [error]
            return [found for x in xrays for found in self._analyze_each([x], names, explainer, sees)]

    def _names(self, models: list[str] | None) -> list[str]:
        names = self.models if models is None else list(models)
        for name in names:
            if name not in self.classifiers:
                raise WeightsError(f"{name!r} is not loaded; loaded are: {', '.join(self.models) or 'none'}.")
        return names

    def suited(self, explainer: Explainer, models: list[str]) -> list[str]:
        """Those of loaded `models` that an explainer can explain."""
        return [name for name in models if explainer.suits(self.classifiers[name])]

    def check_suits(self, explainer: Explainer, models: list[str] | None = None) -> None:
        """Nothing, if an explainer suits loaded `models`; None: all.

        Raises:
            WeightsError: a model that is not loaded.
            ValueError: one of them cannot be explained so; one sentence that says which, and what to do.
        """
        names = self._names(models)
        if unsuited := [name for name in names if name not in self.suited(explainer, names)]:
            raise ValueError(
                f"The explainer {explainer.name!r} does not suit {', '.join(unsuited)}; "
                "choose another explainer, or only networks that it suits."
            )

    def _analyze(
        self,
        xrays: list[XRay],
        names: list[str],
        explainer: Explainer | None,
        lungs: list[Lungs | None],
        sees: str | None,
        progress: Progress | None = None,
    ) -> list[Analysis]:
        if explainer is not None:
            self.check_suits(explainer, names)
        sized = [_Sized(x.pixels) for x in xrays]
        predicted = iter(())
        if None in lungs:
            size = self.entries[SEGMENTER]["preprocessing"]["size"]
            pictures = [picture[size] for picture, own in zip(sized, lungs) if own is None]
            predicted = iter(predict_lungs(self.segmenter, pictures, size))
        lungs = [next(predicted) if own is None else own for own in lungs]
        inputs = {}  # by view: most classifiers share one
        readings = [{} for _ in xrays]
        for done, name in enumerate(names):
            view = View.of(self.entries[name]["preprocessing"])
            if view not in inputs:
                pictures = [picture[view.working] for picture in sized]
                inputs[view] = [shown(x, own, view, sees or view.sees) for x, own in zip(pictures, lungs)]
            watcher = progress and (lambda share, done=done: progress(done + share, len(names)))
            for found, reading in zip(readings, self._read(name, inputs[view], explainer, watcher)):
                found[name] = reading
            if progress:
                progress(done + 1, len(names))
        analyses = []
        for x, own, found in zip(xrays, lungs, readings):
            header = [remark for remark in x.remarks if remark.startswith(HEADER_DENIES)]
            picture, mask = picture_warnings(x.pixels), mask_warnings(own)
            posed, denied, fault, unlike, distance = [], [], None, [], None
            if self.pose is not None and own.features is not None and not picture:
                fault, posed = self.pose.fault(own.features), self.pose.warnings(own.features)
                denied = posed if fault and FAULTS[fault].denies else []
            if self.familiarity is not None and own.features is not None:
                distance = self.familiarity.distance(own.features)
                unlike = [] if denied else self.familiarity.warnings(distance)  # the named cause is told alone
            warnings = [*x.remarks, *picture, *posed, *mask, *unlike]
            withheld = [*header, *picture, *denied, *(mask if implausible(own, mask) else []), *unlike]
            by = explainer.name if explainer else DEFAULT
            analyses.append(Analysis(x.pixels, own, found, warnings, distance, by, withheld, fault))
        return analyses

    def _read(
        self, name: str, views: list[Shown], explainer: Explainer | None, watcher: Callable[[float], None] | None
    ) -> Iterator[Reading]:
        """The readings of one network, which sees all views at once."""
        net, entry = self.classifiers[name], self.entries[name]
        images = torch.from_numpy(np.stack([view.seen for view in views]))[:, None].to(self.device)
        masks = torch.from_numpy(np.stack([view.mask for view in views]).astype(np.float32))[:, None].to(self.device)
        features = runtime.features(net, images, masks)
        if explainer is None:
            with torch.inference_mode():
                every = net.forward_head(features)
        elif explainer.name != DEFAULT:
            net = _own(net)
        for i, view in enumerate(views):
            one = slice(i, i + 1)
            if explainer is None:
                yield _reading(name, entry, view, every[i], features.shape[-2:])
                continue
            share = watcher and (lambda share, i=i: watcher((i + share) / len(views)))
            with watched(share):
                logits, maps = explainer.function(net, images[one], masks[one], features[one])
            yield _reading(name, entry, view, logits, maps.shape[-2:], maps)


def sentence(error: Exception) -> str:
    """Why there is no analysis, for the user: nothing of what an unexpected exception says, which may be anything."""
    if isinstance(error, XRayError):
        return str(error)
    return f"The analysis failed ({type(error).__name__}); save the picture smaller, or report this."


def _device(name: str) -> torch.device:
    """The device that `Pipeline.load` is asked for, once it has been found to work.

    Raises:
        WeightsError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name.startswith("cuda") and not torch.cuda.is_available():
        raise WeightsError("There is no CUDA device here; use the device 'cpu' or 'auto'.")
    try:
        torch.zeros(1, device=name).item()
    except Exception:  # each kind of device has its own
        raise WeightsError(f"There is no device {name!r} here; use the device 'cpu' or 'auto'.") from None
    return torch.device(name)


class _Sized(dict):
    """A picture (H, W) at the square sizes that are asked for, {side: (side, side) float32}, each made once."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __missing__(self, side: int) -> np.ndarray:
        self[side] = resize(self.pixels, side)
        return self[side]


def _read(x: Source) -> XRay:
    if callable(x):
        x = x()
    return x if isinstance(x, XRay) else load_xray(x)


def _try_to_read(x: Source) -> XRay | Exception:
    try:
        return _read(x)
    except Exception as error:
        return error


def _alone(device: torch.device) -> bool:
    """Whether an X-ray goes through the networks alone, on a core of its own: it does on a CPU."""
    return device.type == "cpu"


def _each(several: Iterator[list[Analysis | Exception]], return_exceptions: bool) -> Iterator[Analysis | Exception]:
    with closing(several):
        for found in chain.from_iterable(several):
            if isinstance(found, Exception) and not return_exceptions:
                raise found
            yield found


def _own(net: nn.Module) -> nn.Module:
    """A network with the same tensors, and hooks of its own: explainers hang theirs on it, and other threads run it."""
    return deepcopy(net, {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())})


def _classifiers(entries: dict[str, dict]) -> list[str]:
    """Names of all classifiers of a manifest, in the order of `list_models`."""
    order = {network: i for i, network in enumerate(list_models())}
    names = [name for name, entry in entries.items() if entry.get("task") != SEGMENT]
    return sorted(names, key=lambda name: order.get(entries[name]["network"]["name"], len(order)))


def shown(pixels: np.ndarray, lungs: Lungs, view: View, sees: str) -> Shown:
    """An X-ray (H, W) in [0, 1] and its lungs as a classifier is shown them; `sees` is one of `preprocess.SEES`."""
    whole = lungs.at(view.working)
    box = view.box(whole)
    picture = view.cut(resize(pixels, view.working), box)
    of_right, of_left = (view.cut(side.astype(np.float32), box) for side in sides(whole))
    mask = view.cut(whole.astype(np.float32), box) > 0.5
    right = mask & (of_right >= of_left)
    return Shown(network_input(picture, mask, sees, np.random.default_rng(0)), mask, right, mask & ~right, box)


def _reading(
    name: str,
    entry: dict,
    shown: Shown,
    logits: torch.Tensor,
    native: tuple[int, int],
    maps: torch.Tensor | None = None,
) -> Reading:
    task = task_of(name, entry)
    logits = logits.double() / temperature_of(name, entry)  # fitted on the validation split
    probabilities = (logits.softmax(0) if task.exclusive else logits.sigmoid()).tolist()
    found = {"heatmaps": [], "peaks": [], "in_lung": [], "in_sides": []}
    if maps is not None:
        heatmaps = scale_maps(maps, len(shown.mask))
        mass = np.maximum(heatmaps.sum((1, 2)), 1e-7)
        right, left = ((heatmaps * side).sum((1, 2)) / mass for side in (shown.right, shown.left))
        found = {
            "heatmaps": heatmaps,
            "peaks": maps.amax((1, 2)).tolist(),
            "in_lung": (right + left).tolist(),
            "in_sides": zip(right.tolist(), left.tolist()),
        }
    return Reading(
        probabilities=dict(zip(task.classes, probabilities)),
        predicted=task.classes[int(np.argmax(probabilities))],
        native=tuple(native),
        task=task.name,
        box=shown.box,
        operating_point=operating_point_of(entry) if task.exclusive else 0.0,
        **{key: dict(zip(task.classes, values)) for key, values in found.items()},
    )
