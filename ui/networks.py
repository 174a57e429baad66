"""The pipeline behind the page: loaded once, one X-ray at a time."""

import threading
from pathlib import Path

import torch

from manet_core import Analysis, Pipeline, XRay, create_classifier


class Networks:
    """The pipeline, loaded once, when it is first asked for; a failed attempt is repeated the next time.

    One X-ray is analysed at a time, so that those of a batch and of other visitors take turns.

    Args:
        weights: folder with manifest.json.
        models: the classifiers to ask; None: all that have weights.
    """

    def __init__(self, weights: str | Path, models: list[str] | None = None):
        self.weights, self.models, self._pipeline, self._random = weights, models, None, None
        self._loading, self._turn = threading.Lock(), threading.Lock()

    def get(self) -> Pipeline:
        """The pipeline.

        Raises:
            WeightsError: weights are missing or damaged.
        """
        with self._loading:
            if self._pipeline is None:
                self._pipeline = Pipeline.load(self.weights, self.models)
            return self._pipeline

    def analyze(self, x: XRay, random: bool = False, **what_if) -> Analysis:
        """`Pipeline.analyze` when it is this X-ray's turn; see `get`.

        Args:
            x: the X-ray.
            random: ask the same networks with random weights, always the same ones.
            what_if: further arguments of `Pipeline.analyze`.
        """
        pipeline = self.get()
        with self._turn:
            if random:
                pipeline = self._randomised(pipeline)
            return pipeline.analyze(x, **what_if)

    def _randomised(self, pipeline: Pipeline) -> Pipeline:
        if self._random is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                nets = {name: create_classifier(name).eval().to(pipeline.device) for name in pipeline.models}
            self._random = Pipeline(pipeline.segmenter, nets, pipeline.entries)
        return self._random
