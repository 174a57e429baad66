"""How fast films are read: stage by stage, many over one by one, by cores, as the work grows, and from a cold start."""

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image

from manet_core import Pipeline, load_xray
from manet_core.explain import get_explainer
from manet_core.explain.gradcam import scale_maps
from manet_core.lungs import Lungs, predict_lungs
from manet_core.networks import runtime
from manet_core.phantom import phantom
from manet_core.pipeline import shown
from manet_core.preprocess import View, resize
from manet_core.report import save_report

ROOT = Path(__file__).parents[2]
Paired = Callable[[Callable, Callable, int, str], dict[str, float]]


def film(side: int, seed: int = 0) -> bytes:
    """A phantom of (side, side) pixels as a PNG file."""
    out = io.BytesIO()
    Image.fromarray((phantom(side, seed).pixels * 255).astype(np.uint8)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def milliseconds(function: Callable, runs: int) -> dict[str, float]:
    """Median time of a call, after two that warm up."""
    times = []
    for run in range(runs + 2):
        start = time.perf_counter()
        function()
        if run >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return {"value": float(np.median(times)), "unit": "ms"}


def stages(weights: str, side: int, runs: int) -> dict:
    """Each step from a file to a result, of one film of (side, side) pixels, on its own."""
    pipe, data = Pipeline.load(weights), film(side)
    x, size = load_xray(data), pipe.entries["resunet"]["preprocessing"]["size"]
    (lungs,) = predict_lungs(pipe.segmenter, [x.pixels], size)
    out = {
        "decode": milliseconds(lambda: load_xray(data), runs),
        "resize": milliseconds(lambda: resize(x.pixels, size), runs),
        "mask": milliseconds(lambda: predict_lungs(pipe.segmenter, [x.pixels], size), runs),
    }
    for name in pipe.models:
        out |= _network(pipe, name, x.pixels, lungs, runs)
    analysis = pipe.analyze(x)
    out["panel of the report"] = milliseconds(lambda: save_report(analysis, io.BytesIO(), format="png"), 1)
    return {f"{side}×{side} pixels: {what}": figure for what, figure in out.items()}


def _network(pipe: Pipeline, name: str, pixels: np.ndarray, lungs: Lungs, runs: int) -> dict:
    """The steps of one classifier."""
    net, view = pipe.classifiers[name], View.of(pipe.entries[name]["preprocessing"])
    small = shown(pixels, lungs, view, view.sees)
    parts = (small.seen, small.mask)
    image, mask = (torch.from_numpy(part.astype(np.float32))[None, None].to(pipe.device) for part in parts)
    features, explain = runtime.features(net, image, mask), get_explainer("gradcam").function
    out = {"cut out the lungs": milliseconds(lambda: shown(pixels, lungs, view, view.sees), runs)}
    if net.attention in ("ma", "nma"):
        with torch.inference_mode():
            out[f"{name}: pyramid alone"] = milliseconds(lambda: net.attention_maps(mask), runs)

    def heatmaps() -> None:
        scale_maps(explain(net, image, mask, features)[1], len(small.mask))

    out[f"{name}: body"] = milliseconds(lambda: runtime.features(net, image, mask), runs)
    return out | {f"{name}: head and heatmaps": milliseconds(heatmaps, runs)}


def runtimes(weights: str, paired: Paired, runs: int) -> dict:
    """PyTorch over what the pipeline runs: the segmenter, and each classifier's body."""
    pipe, out = Pipeline.load(weights), {}
    for name in ("resunet", *pipe.models):
        net, size = pipe.classifiers.get(name, pipe.segmenter), pipe.entries[name]["preprocessing"]["size"]
        image = torch.rand(1, 1, size, size, device=pipe.device)
        inputs = (image,) if name == "resunet" else (image * 2 - 1, image.round())
        run = runtime.masks if name == "resunet" else runtime.features

        def both(run=run, net=net, inputs=inputs) -> None:
            run(net, *inputs)

        both()
        what = f"{name}: PyTorch (a) over {runtime.runtime_of(net)} (b)"
        out[what] = paired(by_pytorch()(both), both, runs, name)
    return out


@contextmanager
def by_pytorch() -> Iterator[None]:
    """Within it PyTorch runs all networks."""
    runtime.enabled = False
    try:
        yield
    finally:
        runtime.enabled = True


def many(weights: str, paired: Paired, films: int, rounds: int, sides: tuple[int, ...] = (512, 2000)) -> dict:
    """A loop of `analyze`, as it is and by PyTorch, over `analyze_many` with heatmaps and without; all of files."""
    pipe, out = Pipeline.load(weights), {}
    for side in sides:
        files = [film(side, seed) for seed in range(films)]

        def one_by_one(files=files) -> None:
            for file in files:
                pipe.analyze(file)

        for loop, said in ((one_by_one, "analyze"), (by_pytorch()(one_by_one), "analyze by PyTorch")):
            for heatmaps, made in ((False, "no heatmaps"), (True, "heatmaps")):
                name = f"{films} films of {side}×{side}: {said} in a loop (a) over analyze_many, {made} (b)"
                together = lambda files=files, on=heatmaps: list(pipe.analyze_many(files, heatmaps=on))
                out[name] = paired(loop, together, rounds, f"{side} {made}")
    return out


_PER_FILM = """
import json, resource, sys, time
from manet_core import Pipeline
from train.measures.speed import film, memory
weights, count, side, networks = sys.argv[1], *map(int, sys.argv[2:])
pipe, data = Pipeline.load(weights), film(side)
names = (pipe.models * networks)[:networks]
for i, name in enumerate(names[len(pipe.models):]):
    pipe.classifiers[f"{name}-{i}"], pipe.entries[f"{name}-{i}"] = pipe.classifiers[name], pipe.entries[name]
names = list(pipe.classifiers)[:networks]
list(pipe.analyze_many([data] * 4, names, heatmaps=False))
start = time.perf_counter()
for _ in pipe.analyze_many([data] * count, names, heatmaps=False): pass
print(json.dumps([(time.perf_counter() - start) / count, memory()]))
"""


def resident(field: str, process: int | str = "self") -> int:
    """Bytes of memory of a process, by Linux: "VmRSS", now; "VmHWM", the most so far."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def memory() -> float:
    """The most memory that this process has had, GB.

    Linux's getrusage would tell that of the process which started this one, if that was larger.
    """
    if Path("/proc/self/status").exists():
        return resident("VmHWM") / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (1e9 if sys.platform == "darwin" else 1e6)


def per_film(weights: str, count: int = 10, side: int = 512, networks: int = 4, cores: int | None = None) -> dict:
    """Time a film without heatmaps, and memory, in a process of its own on `cores` cores (None: all)."""
    environment = os.environ | ({} if cores is None else {"OMP_NUM_THREADS": str(cores)})
    command = [sys.executable, "-c", _PER_FILM, weights, *map(str, (count, side, networks))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    seconds, most = json.loads(done.stdout)
    return {"value": 1e3 * seconds, "unit": "ms a film", "memory": most}


def growth(weights: str, long: bool) -> dict:
    """Time a film and memory, as films, pixels, networks and cores grow; one of them at a time."""
    out = {}
    for cores in (1, 2):
        out[f"{cores} of the cores"] = per_film(weights, 20, cores=cores)
    for count in (1, 10, 100, 1000)[: 4 if long else 3]:
        out[f"{count} films"] = per_film(weights, count)
    for side in (512, 1024, 2048, 3464, 7000)[: 5 if long else 4]:
        out[f"{side**2 / 1e6:.2g} megapixels"] = per_film(weights, 6, side)
    for networks in (1, 4, 12)[: 3 if long else 2]:
        out[f"{networks} networks"] = per_film(weights, networks=networks)
    return out


def engines(weights: str, films: int = 1000, part: int = 25) -> dict:
    """Time a film of `python -m manet_core batch` by the local engine over that by Ray with two workers.

    Both count from the command's start to the last part, Ray's start included. {} where Ray is not installed.
    """
    if find_spec("ray") is None:
        return {}
    per_film = {}
    with tempfile.TemporaryDirectory() as folder:
        films_in = Path(folder, "films")
        films_in.mkdir()
        for number in range(films):
            (films_in / f"{number}.png").write_bytes(film(512, number % 20))
        for engine in ("local", "ray"):
            out = Path(tempfile.mkdtemp(dir=folder))
            command = [sys.executable, "-m", "manet_core", "batch", films_in, "--out", out, "--engine", engine]
            command += ["--weights", str(weights), "--part", str(part), "--workers", "2"]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            done = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            assert done["read"] == films
            per_film[engine] = 1e3 * done["seconds"] / films
    local, ray = per_film.values()
    what = f"{films} films of 512×512: batch by the local engine (a) over Ray with 2 workers (b), a film"
    return {what: {"a_ms": local, "b_ms": ray, "ratio": local / ray}}


def starts(weights: str, port: int = 7993) -> dict:
    """From a cold start to: the library, its first answer, the command line's help, and the page."""
    first = f"import manet_core as m; m.Pipeline.load({weights!r}).analyze(open({{}}, 'rb').read())"
    path = ROOT / "docs" / "page.png"  # any picture
    commands = {
        "import manet_core": ["-c", "import manet_core"],
        "python -m manet_core --help": ["-m", "manet_core", "--help"],
        "library to the first answer": ["-c", first.format(repr(str(path)))],
    }
    out = {}
    for what, command in commands.items():
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        out[what] = {"value": 1e3 * (time.perf_counter() - start), "unit": "ms"}
    start = time.perf_counter()
    command = [sys.executable, "app.py", "--port", str(port), "--weights", weights]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as page:
        try:
            while not _answers(f"http://127.0.0.1:{port}/"):
                if page.poll() is not None or time.perf_counter() - start > 120:
                    raise SystemExit(f"The page does not start on port {port}.")
                time.sleep(0.05)
            out["page"] = {"value": 1e3 * (time.perf_counter() - start), "unit": "ms"}
        finally:
            page.terminate()
    return out


def _answers(address: str) -> bool:
    try:
        with urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def torchxrayvision(weights: str, paired: Paired, runs: int) -> dict:
    """A file to one class's heatmap as torchxrayvision's notebook does it, random weights, over all of ours.

    {} where it is not installed.
    """
    try:
        import torchxrayvision as xrv
    except ImportError:
        return {}
    import torchvision

    net = xrv.models.DenseNet(num_classes=18, in_channels=1).eval()
    prepare = torchvision.transforms.Compose([xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(224)])
    data, pipe = film(1024), Pipeline.load(weights)
    name = pipe.models[0]

    def theirs() -> None:
        image = torch.from_numpy(prepare(xrv.utils.load_image(path)))[None].float()
        features = net.features(image)
        features.retain_grad()
        logits = net.classifier(torch.relu(features).mean((2, 3)))
        logits[0, 0].backward()
        small = (features.grad.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True).relu()
        torch.nn.functional.interpolate(small, (224, 224), mode="bilinear")

    what = f"torchxrayvision's DenseNet-121, one heatmap (a) over mask, {name} and its heatmaps (b)"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "film.png")
        path.write_bytes(data)
        return {what: paired(theirs, lambda: pipe.analyze(path, [name]), runs, "torchxrayvision")}
