"""X-ray in, second opinion out: masks, readings, heatmaps, warnings."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .explain.gradcam import grad_cam, scale_maps
from .familiarity import Familiarity
from .files.quality import picture_warnings
from .files.xray import XRay
from .lungs import Lungs, mask_warnings, predict_lungs, sides
from .networks.registry import list_models
from .preprocess import network_input, resize
from .weights import WeightsError, fingerprint, load_network, read_manifest

DISCLAIMER = "Research and teaching only, not a medical device."
SEGMENTER = "resunet"


@dataclass(frozen=True)
class Reading:
    """What one classifier says of one X-ray.

    Attributes:
        probabilities: {class: float}, sums to 1.
        predicted: the class of the highest probability.
        heatmaps: {class: (h, w) float32 in [0, 1]}, Grad-CAM at the last block, at
            the network's input size, each min–max scaled on its own.
        peaks: {class: float}, each map's raw maximum before scaling.
        in_lung: {class: float in [0, 1]}, the share of the heatmap's mass inside
            the cleaned mask; NaN-free: 0 for an empty heatmap.
        native: (h, w) of the features, the resolution that a heatmap really has.
        in_sides: {class: (right, left)}, `in_lung` by the patient's right and left lung.
    """

    probabilities: dict[str, float]
    predicted: str
    heatmaps: dict[str, np.ndarray] = field(repr=False)
    peaks: dict[str, float]
    in_lung: dict[str, float]
    native: tuple[int, int]
    in_sides: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Analysis:
    """One X-ray, analysed. The four pictures have the X-ray's own (H, W).

    Attributes:
        original: (H, W) float32 in [0, 1].
        segmentation: the predicted and the cleaned mask at the segmenter's size.
        readings: {model: Reading}.
        warnings: plain sentences; [] when all is well.
        distance: how unlike the training X-rays it is, about 1 for one of them; None if the weights cannot tell.
    """

    original: np.ndarray = field(repr=False)
    segmentation: Lungs = field(repr=False)
    readings: dict[str, Reading]
    warnings: list[str]
    distance: float | None = None

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
    def votes(self) -> dict[str, int]:
        """{class: number of networks that predict it}, the most first."""
        return dict(Counter(reading.predicted for reading in self.readings.values()).most_common())

    @property
    def leading(self) -> list[str]:
        """The classes that most networks predict: one, several if they tie, none if no network was asked."""
        most = max(self.votes.values(), default=0)
        return [name for name, count in self.votes.items() if count == most]

    def heatmap(self, model: str, name: str) -> np.ndarray:
        """The heatmap of class `name` by `model`, enlarged to (H, W), float32 in [0, 1].

        Raises:
            KeyError: `model` did not read this X-ray, or there is no such class.
        """
        return resize(self.readings[model].heatmaps[name], self.original.shape)

    def to_dict(self) -> dict:
        """The result without pixels and without anything about the patient, ready for JSON."""
        areas = [float(side.mean()) for side in sides(self.segmentation.cleaned)]
        return {
            "readings": {
                model: {
                    "probabilities": reading.probabilities,
                    "predicted": reading.predicted,
                    "in_lung": reading.in_lung,
                }
                for model, reading in self.readings.items()
            },
            "lung_area": float(self.segmentation.cleaned.mean()),
            "lung_areas": dict(zip(("right", "left"), areas)),
            "height": self.original.shape[0],
            "width": self.original.shape[1],
            "distance": self.distance,
            "warnings": list(self.warnings),
            "disclaimer": DISCLAIMER,
        }


class Pipeline:
    """The networks, loaded once; `analyze` may be called again and again.

    Example:
        >>> from manet_core import Pipeline
        >>> from manet_core.phantom import phantom
        >>> pipe = Pipeline.load(models=["efficientnet_lite0_ma"])
        >>> pipe.analyze(phantom(seed=0)).readings["efficientnet_lite0_ma"].predicted in pipe.classes
        True
    """

    def __init__(
        self,
        segmenter: nn.Module,
        classifiers: dict[str, nn.Module],
        entries: dict[str, dict],
        familiarity: Familiarity | None = None,
    ):
        self.segmenter, self.classifiers, self.entries, self.familiarity = segmenter, classifiers, entries, familiarity

    @classmethod
    def load(cls, weights: str | Path = "weights", models: list[str] | None = None, device: str = "auto") -> "Pipeline":
        """Load the segmenter and `models` (None: all classifiers of the manifest) from a weights folder.

        Args:
            weights: folder with manifest.json.
            models: names of classifiers; [] for the mask alone.
            device: "auto" (CUDA when present), "cpu", "cuda", "cuda:1", ...

        Raises:
            WeightsError: weights are missing or damaged, or there is no such device.
        """
        entries = read_manifest(weights)
        if models is None:
            models = [name for name in list_models() if name in entries]
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device.startswith("cuda") and not torch.cuda.is_available():
            raise WeightsError("There is no CUDA device here; use the device 'cpu' or 'auto'.")
        segmenter = load_network(weights, SEGMENTER, device)
        classifiers = {name: load_network(weights, name, device) for name in models}
        return cls(segmenter, classifiers, entries, Familiarity.load(weights, entries[SEGMENTER]))

    @property
    def models(self) -> list[str]:
        """Names of the loaded classifiers."""
        return list(self.classifiers)

    @property
    def hashes(self) -> dict[str, str]:
        """{model: SHA-256 of its weights} of the loaded classifiers; see `weights.fingerprint`."""
        return {name: fingerprint(self.entries[name]) for name in self.classifiers}

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.segmenter.parameters()).device

    def analyze(
        self, x: XRay, models: list[str] | None = None, lungs: Lungs | None = None, sees: str = "lungs"
    ) -> Analysis:
        """Mask, clean, classify and explain one X-ray.

        Args:
            x: from `load_xray`.
            models: loaded names to ask; None: all; []: stop after the mask.
            lungs: a mask to use in place of the predicted one, for "what if".
            sees: what the classifiers are shown, one of `preprocess.SEES`; all but "lungs" are for "what if", too.

        Raises:
            WeightsError: a model that is not loaded.
            ValueError: there is no such `sees`.
        """
        names = self.models if models is None else list(models)
        for name in names:
            if name not in self.classifiers:
                raise WeightsError(f"{name!r} is not loaded; loaded are: {', '.join(self.models) or 'none'}.")
        segmentation = lungs
        if lungs is None:
            size = self.entries[SEGMENTER]["preprocessing"]["size"]
            (segmentation,) = predict_lungs(self.segmenter, [x.pixels], size)
        inputs = {}  # network input by size: most classifiers share one
        readings = {}
        for name in names:
            size = self.entries[name]["preprocessing"]["size"]
            if size not in inputs:
                inputs[size] = self._input(x.pixels, segmentation, size, sees)
            readings[name] = self._read(name, *inputs[size])
        warnings = [*x.remarks, *picture_warnings(x.pixels), *mask_warnings(segmentation)]
        distance = None
        if self.familiarity is not None and segmentation.features is not None:
            distance = self.familiarity.distance(segmentation.features)
            warnings += self.familiarity.warnings(distance)
        return Analysis(x.pixels, segmentation, readings, warnings, distance)

    def _input(
        self, pixels: np.ndarray, segmentation: Lungs, size: int, sees: str
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """What is seen (1, 1, S, S) in [−1, 1], mask (1, 1, S, S), and the mask as (S, S) bool."""
        mask = segmentation.at(size)
        seen = network_input(resize(pixels, size), mask, sees, np.random.default_rng(0))
        image = torch.from_numpy(seen)[None, None]
        return image.to(self.device), torch.from_numpy(mask.astype(np.float32))[None, None].to(self.device), mask

    def _read(self, name: str, image: torch.Tensor, mask: torch.Tensor, lungs: np.ndarray) -> Reading:
        net, classes = self.classifiers[name], self.entries[name]["classes"]
        with torch.inference_mode():
            features = net.forward_features(image, mask)
        logits, maps = grad_cam(net, features)
        # The temperature was fitted on the validation split; 1 is a network as trained.
        probabilities = (logits.double() / self.entries[name].get("temperature", 1.0)).softmax(0).tolist()
        heatmaps = scale_maps(maps, lungs.shape[0])
        mass = np.maximum(heatmaps.sum((1, 2)), 1e-7)
        right, left = ((heatmaps * side).sum((1, 2)) / mass for side in sides(lungs))
        return Reading(
            probabilities=dict(zip(classes, probabilities)),
            predicted=classes[int(np.argmax(probabilities))],
            heatmaps=dict(zip(classes, heatmaps)),
            peaks=dict(zip(classes, maps.amax((1, 2)).tolist())),
            in_lung=dict(zip(classes, (right + left).tolist())),
            native=tuple(maps.shape[-2:]),
            in_sides=dict(zip(classes, zip(right.tolist(), left.tolist()))),
        )
