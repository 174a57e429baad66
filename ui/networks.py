"""The pipeline behind the page: loaded once, one X-ray at a time; and what is kept of an X-ray while it is shown."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

from manet_core import Analysis, Pipeline, WeightsError, XRay, create_classifier
from manet_core.explain import DEFAULT, get_explainer
from manet_core.heatmap_means import HeatmapMean, load_means
from manet_core.phantom import phantom
from manet_core.preprocess import View, resize
from manet_core.tasks import list_tasks
from manet_core.weights import MANIFEST, read_manifest, sets_of, task_of

from .render import fit

PAUSE_S, LONGEST_S = 0.1, 5.0  # for which an archive waits after a single X-ray, and in all for one of its own
KEEP_SIDE = 1024  # pixels of the picture that is kept
# Where Gradio's queue puts what runs networks. Batches, say, may be under way together, since `Networks`
# gives each X-ray its turn; the lowest limit of an id holds for all of it, so every event needs one of these whole.
ANALYSES = {"concurrency_id": "analyses", "concurrency_limit": 1}
BATCHES = {"concurrency_id": "batches", "concurrency_limit": 4}
EXPLANATIONS = {"concurrency_id": "explanations", "concurrency_limit": 4}
COMPARISONS = {"concurrency_id": "comparisons", "concurrency_limit": 4}


def results_of(weights: str | Path) -> list[Path]:
    """The folders with the figures of each set of these weights.

    For a manifest NAME.json it is results/NAME where there is one, or else results.
    """
    try:
        sets = sets_of(weights)
    except WeightsError:
        return []
    folders = []
    for path in sets:
        results = path.parent.parent / "results"
        own = results / path.stem
        folders.append(own if path.name != MANIFEST and own.is_dir() else results)
    return folders


@dataclass(frozen=True)
class Film:
    """What is kept of an X-ray while a page shows it.

    Attributes:
        analysis: its `original` no larger than `KEEP_SIDE`.
        inputs: {side: the X-ray at (side, side)}, one for each size to which a loaded network brings a picture. To
            them these are the X-ray itself, so that whatever is computed again equals what came from the file.
        shape: (H, W) of the X-ray itself.
        name: what its file was called; "" where there is none.
        sha256: of the pixels as they were read, `load_xray(file).pixels`, hexadecimal.
        read_at: when, by the server's clock.
        key: by which the viewer knows it.
    """

    analysis: Analysis
    inputs: dict[int, np.ndarray] = field(repr=False)
    shape: tuple[int, int]
    name: str
    sha256: str
    read_at: datetime
    key: str = ""


class Networks:
    """The pipeline, loaded once, when it is first asked for; a failed attempt is repeated the next time.

    One X-ray is analysed at a time, so that those of a batch and of other visitors take turns.

    Args:
        weights: folder with manifest.json, or a manifest file.
        models: the classifiers to run; None: all that have weights.

    Attributes:
        means: {network: {class: the mean of its heatmaps by Grad-CAM}}, where these are of the very weights; {} before
            the pipeline is loaded.
    """

    def __init__(self, weights: str | Path, models: list[str] | None = None):
        self.means: dict[str, dict[str, HeatmapMean]] = {}
        self.weights, self.models, self._pipeline, self._random = weights, models, None, None
        self._first: list[str] = []
        self._loading, self._turn, self._warm = threading.Lock(), threading.Lock(), False
        self._changed, self._urgent, self._answered = threading.Condition(), 0, 0.0

    def get(self) -> Pipeline:
        """The pipeline.

        Raises:
            WeightsError: weights are missing or damaged.
        """
        with self._loading:
            if self._pipeline is None:
                pipeline = Pipeline.load(self.weights, self.models)
                first = read_manifest(sets_of(self.weights)[0]) if self.models is None else pipeline.models
                self._first = [name for name in pipeline.models if name in first]
                self.means = load_means(self.weights, pipeline.entries)
                self._pipeline = pipeline
            return self._pipeline

    def warm(self) -> None:
        """Do meanwhile, once, what the first X-ray would wait for: networks are made ready when they are first run.

        Raises:
            WeightsError: as `get`.
        """
        pipeline = self.get()
        with self._loading:
            first, self._warm = not self._warm, True
        if first:
            threading.Thread(target=pipeline.analyze, args=(phantom(128),), name="warming", daemon=True).start()

    def tasks(self) -> list[str]:
        """The tasks of the networks that are to be run, by the manifest alone; [] where it cannot be read."""
        try:
            entries = read_manifest(self.weights)
        except WeightsError:
            return []
        asked = {entry["task"] for name, entry in entries.items() if self.models is None or name in self.models}
        return [task for task in list_tasks() if task in asked]

    def of_tasks(self, tasks: list[str]) -> list[str]:
        """Names of the networks of these tasks; see `get`."""
        pipeline = self.get()
        return [name for name in pipeline.models if pipeline.entries[name]["task"] in tasks]

    def at_first(self) -> list[str]:
        """Names of the networks that answer where nobody chooses, of several joined sets the first one's; see `get`."""
        self.get()
        return self._first

    def suited(self, explainer: str, models: list[str]) -> list[str]:
        """Those of `models` that an explainer can explain; see `get`."""
        return self.get().suited(get_explainer(explainer), models)

    def analyze(self, x: XRay, random: bool = False, **options) -> Analysis:
        """`Pipeline.analyze` when it is this X-ray's turn; see `get`.

        Args:
            x: the X-ray.
            random: run the same networks with random weights, always the same ones.
            options: further arguments of `Pipeline.analyze`.
        """
        pipeline = self.get()
        with self._noted(), self._turn:
            if random:
                pipeline = self._randomised(pipeline)
            return pipeline.analyze(x, **options)

    def patiently(self, read: Callable[[], XRay]) -> Callable[[], XRay]:
        """`read`, which waits until nobody waits for a single X-ray, so that an archive lets others go first.

        Between the X-rays of a queue is a moment without any, which is waited for, too. No X-ray of an archive waits
        longer than `LONGEST_S`.
        """

        def wait_and_read() -> XRay:
            end = time.monotonic() + LONGEST_S
            with self._changed:
                while (now := time.monotonic()) < end:
                    until = end if self._urgent else min(end, self._answered + PAUSE_S)
                    if until <= now:
                        break
                    self._changed.wait(until - now)
            return read()

        return wait_and_read

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Somebody waits meanwhile."""
        with self._changed:
            self._urgent += 1
        try:
            yield
        finally:
            with self._changed:
                self._urgent, self._answered = self._urgent - 1, time.monotonic()
                self._changed.notify_all()

    def keep(self, x: XRay, analysis: Analysis, name: str = "", key: str = "") -> Film:
        """What a page needs of an X-ray and its analysis from now on; `name` is its file's, `key` the viewer's."""
        return Film(
            replace(analysis, original=resize(x.pixels, fit(x.pixels.shape, KEEP_SIDE))),
            {side: resize(x.pixels, side) for side in {self.view(model).working for model in self.get().models}},
            x.pixels.shape,
            name,
            hashlib.sha256(np.ascontiguousarray(x.pixels)).hexdigest(),
            datetime.now().astimezone(),
            key,
        )

    def whole(self) -> list[str]:
        """Names of the networks that are shown something else than the segmented lungs: the whole X-ray; see `get`."""
        return [name for name in self.get().models if self.view(name).sees != "lungs"]

    def view(self, name: str) -> View:
        """How an X-ray becomes the input of the network `name`."""
        return View.of(self.get().entries[name]["preprocessing"])

    def input_of(self, film: Film, name: str) -> np.ndarray:
        """A kept film at the size to which the network `name` brings it."""
        return film.inputs[self.view(name).working]

    def again(
        self,
        film: Film,
        models: list[str],
        progress: Callable[[float, int], None] | None = None,
        random: bool = False,
        **options,
    ) -> Analysis:
        """Analyse a kept film once more; between two networks, others have their turn.

        Args:
            film: from `keep`.
            models: the networks to run, whether they have read it before or not.
            progress: called with the networks that are done, whole or in part, and how many there are; what it
                raises ends the work.
            random: as `analyze` has it.
            options: further arguments of `Pipeline.analyze`; the lungs are the film's unless given.
        """
        options = {"lungs": film.analysis.segmentation} | options
        slow = get_explainer(options.get("explainer", DEFAULT)).slow
        readings, found = {}, film.analysis
        for done, name in enumerate(models):
            tell = progress and (lambda share, _, done=done: progress(done + share, len(models)))
            run = self._in_steps if slow else self.analyze
            found = run(XRay(self.input_of(film, name)), random, models=[name], progress=tell, **options)
            readings |= found.readings
        return replace(film.analysis, readings=readings, segmentation=found.segmentation, explainer=found.explainer)

    def _in_steps(
        self, x: XRay, random: bool, models: list[str], progress: Callable[[float, int], None] | None, **options
    ) -> Analysis:
        """As `analyze`, but others have their turn at every step of a slow explainer.

        That they run the same networks meanwhile does no harm: the pipeline gives the explainer modules of its own,
        and nobody writes into their tensors, which are shared.
        """
        pipeline = self.get()

        def step(done: float, count: int) -> None:
            self._turn.release()
            try:
                time.sleep(0.01)  # or this thread takes the lock again before one that waits for it wakes up
                if progress:
                    progress(done, count)
            finally:
                self._turn.acquire()

        with self._turn:
            if random:
                pipeline = self._randomised(pipeline)
            return pipeline.analyze(x, models=models, progress=step, **options)

    def _randomised(self, pipeline: Pipeline) -> Pipeline:
        if self._random is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                nets = {
                    name: _random_network(name, pipeline.entries[name]).eval().requires_grad_(False).to(pipeline.device)
                    for name in pipeline.models
                }
            self._random = Pipeline(pipeline.segmenter, nets, pipeline.entries)
        return self._random


def _random_network(name: str, entry: dict) -> torch.nn.Module:
    options = dict(entry["network"])
    return create_classifier(options.pop("name"), num_classes=len(task_of(name, entry).classes), **options)
