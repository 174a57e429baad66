"""What programs may call: one X-ray, many X-rays, the list of networks."""

import json
import time
from collections.abc import Iterator

from manet_core import WeightsError, XRayError
from manet_core.networks.registry import split_name
from manet_core.weights import task_of

from . import batch
from .networks import ANALYSES, BATCHES, Networks
from .startup import gr
from .uploads import Uploads


def add_endpoints(networks: Networks, uploads: Uploads) -> None:
    """Add `/analyze`, `/batch` and `/models` to the page that is being built."""

    def analyze(file: gr.FileData) -> dict:
        """Lung segmentation and classification of one frontal chest X-ray; research and teaching only.

        Args:
            file: the X-ray, one PNG, JPEG, TIFF, BMP, WebP or DICOM file.

        Returns:
            {"readings": {model: {"task": name, "probabilities": {class: 0 to 1}, "predicted": class,
            "operating_point": the probability that a claim needs, "in_lung": {class: 0 to 1}}}, "claims": {task:
            [class that all its networks are sure of, or findings that half of them name], or null where nothing may be
            said}, "means": {task: {class: mean of its networks' probabilities}}, "explainer": what made the heatmaps
            behind "in_lung",
            "lung_area": 0 to 1, "lung_areas": {"right", "left"}, "height", "width", "distance": from the training
            X-rays, about 1 for one of them, or null, "reliable": false where no class should be named, "withheld":
            [sentence why], "warnings": [sentence, those of "withheld" too], "disclaimer"}; no pixels, nothing about
            the patient. The probabilities of a network sum to 1, except where its task has findings that may occur
            together.
        """
        try:
            return networks.analyze(uploads.read(file), models=networks.at_first()).to_dict()
        except (XRayError, WeightsError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def analyze_many(files: list[gr.FileData]) -> Iterator[list[dict]]:
        """Analysis of many X-rays, in their order; a zip archive counts as the files in it.

        The answer grows while they are read: `submit` of gradio_client yields what there is so far, about every
        second, and `predict` returns all of it.

        Args:
            files: PNG, JPEG, TIFF, BMP, WebP, DICOM or zip files.

        Returns:
            For each file {"file": its name} and what `/analyze` returns, or {"file", "error": a sentence}.
        """
        try:
            told, due = [], 0.0
            for rows, _ in batch.read_all(networks, uploads, files):
                if time.monotonic() > due:
                    told = told + json.loads(batch.as_json(rows[len(told) :]))
                    yield told
                    due = time.monotonic() + batch.REDRAW_S * (1 + len(told) / 100)  # a long answer is told less often
            yield told + json.loads(batch.as_json(rows[len(told) :]))
        except (XRayError, WeightsError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    def list_networks() -> list[dict]:
        """The networks that answer `/analyze` and `/batch`.

        Returns:
            [{"name", "task", "backbone", "attention": "" or its name, "classes", "input_size": pixels,
            "temperature", "sha256": of the weights, and after a "+" of their refitted last layer}]
        """
        try:
            pipeline, names = networks.get(), networks.at_first()
        except WeightsError as error:
            raise gr.Error(str(error), print_exception=False) from None
        found = []
        for name in names:
            entry = pipeline.entries[name]
            backbone, attention = split_name(entry["network"]["name"])  # `name` is the manifest's own
            found.append(
                {
                    "name": name,
                    "task": entry["task"],
                    "backbone": backbone,
                    "attention": attention,
                    "classes": list(task_of(name, entry).classes),
                    "input_size": entry["preprocessing"]["size"],
                    "temperature": entry["temperature"],
                    "sha256": pipeline.hashes[name],
                }
            )
        return found

    analyze_many.__annotations__["return"] = list[dict]  # what each step is: Gradio knows no iterators
    readings = "probabilities and prediction of each network, lung areas, warnings; no pixels, nothing of the patient"
    film, films = "one PNG, JPEG, TIFF, BMP, WebP or DICOM file", "PNG, JPEG, TIFF, BMP, WebP, DICOM or zip files"
    _describe(gr.api(analyze, api_name="analyze", **ANALYSES), readings, film)
    _describe(gr.api(analyze_many, api_name="batch", **BATCHES), f"of each file its name, and {readings}", films)
    _describe(gr.api(list_networks, api_name="models"), "of each network its name, task, classes and weights' SHA-256")


def _describe(endpoint: gr.events.Dependency, answer: str, *arguments: str) -> None:
    """Let `view_api` of gradio_client say what an endpoint takes and answers, for which Gradio has no option."""
    function = gr.context.Context.root_block.fns[endpoint["id"]]
    for component, said in zip(function.inputs, arguments, strict=True):
        component._api_info = component._api_info | {"additional_description": said}
    (output,) = function.outputs
    output._api_info = output._api_info | {"description": answer}
