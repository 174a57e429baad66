"""Measure what speed is claimed.

    python -m train.benchmark                        # analysis, heatmaps, mask attention, many films, starts
    python -m train.benchmark films                  # of these, many films alone: stages, growth, starts; --long: more
    python -m train.benchmark engines                # an archive by this machine alone and by Ray, some minutes
    python -m train.benchmark training --data DATA   # what loading and augmenting leave of the training speed
    python -m train.benchmark --record               # also into docs/speed.md

The classifiers have random weights, which cost the same time as trained ones.
All figures of one run are measured in turn on the same machine, in pairs, so
that a drifting clock speed touches both sides alike; ratios are medians of the
pairs' ratios.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from manet_core import Pipeline, create_classifier, list_models
from manet_core.explain.library import BindMask
from manet_core.networks import runtime
from manet_core.phantom import phantom
from manet_core.tasks import MANET

from . import run_verb
from .augment import augmentation
from .classify import class_loss
from .data import lung_pictures
from .engine import autocast, device_of, keep_freed_memory, training_precision
from .measures import speed
from .measures.markdown import write_between
from .recipe import Recipe, Run


def paired(a: Callable, b: Callable, runs: int, name: str) -> dict[str, float]:
    """Median seconds of `a` and `b`, called in turn, and the median of the ratios a/b."""
    for warm in (a, b, a, b):
        warm()
    times = np.empty((runs, 2))
    for run in tqdm(range(runs), name, leave=False):
        for side, function in enumerate((a, b) if run % 2 == 0 else (b, a)):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[run, side if run % 2 == 0 else 1 - side] = time.perf_counter() - start
    a_seconds, b_seconds = np.median(times, axis=0)
    return {"a_ms": 1e3 * a_seconds, "b_ms": 1e3 * b_seconds, "ratio": float(np.median(times[:, 0] / times[:, 1]))}


def benchmark_pipeline(weights: str, backbone: str, runs: int) -> dict:
    """One X-ray through mask, trio and fifteen heatmaps, against bare forward passes and against pytorch-grad-cam."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    pipe = Pipeline.load(weights, [])
    size = pipe.entries["resunet"]["preprocessing"]["size"]
    for name in (backbone, f"{backbone}_ma", f"{backbone}_cbam"):
        net = create_classifier(name).eval().requires_grad_(False)
        pipe.classifiers[name] = net.to(pipe.device, memory_format=torch.channels_last)
        pipe.entries[name] = {"task": "manet", "temperature": 1.0, "preprocessing": {"size": size}}
    x = phantom(512)
    picture = torch.rand(1, 1, size, size, device=pipe.device)
    image = torch.rand(1, 1, size, size, device=pipe.device) * 2 - 1
    mask = torch.rand(1, 1, size, size, device=pipe.device).round()

    def full() -> None:
        analysis = pipe.analyze(x)
        assert sum(len(reading.heatmaps) for reading in analysis.readings.values()) == 15

    @torch.inference_mode()
    def bare() -> None:
        pipe.segmenter(picture)
        for net in pipe.classifiers.values():
            net(image, mask)

    def library() -> None:
        with torch.inference_mode():
            pipe.segmenter(picture)
        for net in pipe.classifiers.values():
            with GradCAM(BindMask(net, mask), [net.last_block]) as cam:
                for k in range(5):
                    cam(image.clone().requires_grad_(), [ClassifierOutputTarget(k)])

    return {
        f"{backbone} trio: analysis with 15 heatmaps (a) over bare forward passes (b)": paired(
            full, bare, runs, "analysis"
        ),
        f"{backbone} trio: pytorch-grad-cam class by class (a) over our analysis (b)": paired(
            library, full, max(3, runs // 10), "grad-cam"
        ),
    }


def benchmark_mask_attention(backbone: str, runs: int, size: int = 224) -> dict:
    """MA over plain: inference of one picture, as the pipeline runs it, and a training step of 16."""
    device = device_of(Run(data=""))
    bf16 = autocast(Recipe(), device)
    nets = {n: create_classifier(n).to(device, memory_format=torch.channels_last) for n in (f"{backbone}_ma", backbone)}
    image = torch.rand(16, 1, size, size, device=device).to(memory_format=torch.channels_last) * 2 - 1
    mask, label = torch.rand(16, 1, size, size, device=device).round(), torch.randint(0, 5, (16,), device=device)
    optimizers = {n: torch.optim.SGD(net.parameters(), 0.01, 0.9) for n, net in nets.items()}

    def infer(name: str) -> Callable:
        @torch.inference_mode()
        def run() -> None:
            nets[name].forward_head(runtime.features(nets[name], image[:1], mask[:1]))

        return run

    def step(name: str) -> Callable:
        def run() -> None:
            with training_precision(bf16, device):
                loss = F.cross_entropy(nets[name](image, mask).float(), label)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        return run

    out = {}
    for net in nets.values():
        net.eval()
    out[f"{backbone}: inference, MA (a) over plain (b)"] = paired(*(infer(n) for n in nets), runs, "inference")
    keep_freed_memory(device)
    for net in nets.values():
        net.train()
    out[f"{backbone}: training step, MA (a) over plain (b)"] = paired(
        *(step(n) for n in nets), max(5, runs // 5), "training step"
    )
    return out


def benchmark_training(recipe: Recipe, run: Run, steps: int, rounds: int = 3) -> dict:
    """A step on a fixed batch over a step of the whole loop, that is images/s of the loop over images/s of the step.

    The loop loads and augments as `train.classify` does, with as many workers; 1 means that it costs nothing.
    """
    device = device_of(run)
    bf16 = autocast(recipe, device)
    net = create_classifier(recipe.model).to(device, memory_format=torch.channels_last).train()
    keep_freed_memory(device)
    optimizer = torch.optim.SGD(net.parameters(), recipe.lr, 0.9)
    dataset = lung_pictures(recipe, run, "train", task=MANET, augment=augmentation(30, True, recipe.augment))
    loader = DataLoader(
        dataset, recipe.batch, shuffle=True, drop_last=True, num_workers=run.workers, pin_memory=device.type == "cuda"
    )

    def step(batch: tuple) -> None:
        image, mask, target = (part.to(device, non_blocking=True) for part in batch)
        with training_precision(bf16, device):
            loss = class_loss(net(image.to(memory_format=torch.channels_last), mask), target, MANET)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(batches: Iterator[tuple]) -> float:
        for _ in range(3):
            step(next(batches))  # warm, and the workers are under way
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step(next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    fixed = next(iter(loader))
    times = []
    for _ in tqdm(range(rounds), "training loop", leave=False):
        times.append((seconds(iter(lambda: fixed, None)), seconds(iter(loader))))
    a, b = np.median(times, axis=0)
    ratio = float(np.median([x / y for x, y in times]))
    name = f"{recipe.model}: training step of {recipe.batch} on a fixed batch (a) over one of the whole loop (b)"
    return {name: {"a_ms": 1e3 * a, "b_ms": 1e3 * b, "ratio": ratio}}


def benchmark_films(weights: str, runs: int, long: bool) -> Iterator[dict]:
    """From a file to a result, of one film and of many, section by section; see `measures.speed`."""
    few = max(2, runs // 5)
    yield speed.runtimes(weights, paired, few)
    yield speed.torchxrayvision(weights, paired, few)
    yield speed.many(weights, paired, films=6, rounds=max(1, runs // 16))
    yield speed.stages(weights, 512, few) | speed.stages(weights, 2000, few)
    yield speed.starts(weights)
    yield speed.growth(weights, long)


def _sections(args: argparse.Namespace) -> Iterator[dict]:
    """What `args` ask for, measured section by section."""
    if args.what == "training":
        recipe = Recipe(model=args.backbone, size=args.size, batch=args.batch)
        run = Run(args.data, cache=args.cache, weights=args.weights, workers=args.workers)
        yield benchmark_training(recipe, run, args.steps)
    if args.what == "inference":
        yield benchmark_pipeline(args.weights, args.backbone, args.runs)
        yield benchmark_mask_attention(args.backbone, args.runs)
    if args.what == "engines":
        yield speed.engines(args.weights)
    if args.what in ("inference", "films"):
        yield from benchmark_films(args.weights, args.runs, args.long)


def table(results: dict, stages: bool = True) -> str:
    """The results as Markdown, with the stages from a film's file to its result or without."""
    machine = f"{results['processor']}, {results['instructions']}"
    lines = [f"On {results['device']} ({machine}), torch {results['torch']}:", ""]
    lines += ["| what | a, ms | b, ms | a / b |", "|---|---|---|---|"]
    figures = {
        name: figure
        for name, figure in results.items()
        if isinstance(figure, dict) and (stages or " pixels: " not in name)
    }
    for name, figure in figures.items():
        if "ratio" in figure:
            lines.append(f"| {name} | {figure['a_ms']:.1f} | {figure['b_ms']:.1f} | {figure['ratio']:.3f} |")
    single = {name: figure for name, figure in figures.items() if "value" in figure}
    if single:
        lines += ["", "| what | ms | most memory, GB |", "|---|---|---|"]
    for name, figure in single.items():
        memory = f"{figure['memory']:.2f}" if "memory" in figure else ""
        lines.append(f"| {name}, {figure['unit']} | {figure['value']:.1f} | {memory} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write what was measured into results/benchmark.json and benchmark.md."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", nargs="?", default="inference", choices=["inference", "films", "engines", "training"])
    p.add_argument("--weights", default="weights")
    p.add_argument("--long", action="store_true", help="films: up to 1000, 49 megapixels and 12 networks")
    p.add_argument("--backbone", default="resnet34", choices=[n for n in list_models() if f"{n}_ma" in list_models()])
    p.add_argument("--runs", type=int, default=50, help="pairs of timings (inference)")
    p.add_argument("--data", default=os.environ.get("MANET_DATA", "data"), help="folder with index.csv (training)")
    p.add_argument("--cache", default=Run.cache, help="folder for decoded pictures (training)")
    p.add_argument("--workers", type=int, default=Run.workers, help="loader processes (training)")
    p.add_argument("--size", type=int, default=224, help="side of the square input, pixels (training)")
    p.add_argument("--batch", type=int, default=32, help="pictures a step (training)")
    p.add_argument("--steps", type=int, default=10, help="steps a timing (training)")
    p.add_argument("--out", default="results", type=Path)
    p.add_argument("--record", action="store_true", help="write the figures into docs/speed.md")
    args = p.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    machine = {
        "device": device,
        "processor": platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    path = args.out / "benchmark.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if any(earlier.get(key) != value for key, value in machine.items()):
        earlier = {}  # figures of two machines do not belong into one table
    results = earlier | machine
    args.out.mkdir(parents=True, exist_ok=True)
    for figures in _sections(args):
        results |= figures
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")  # kept, whatever interrupts the rest
    print(table(results))
    report = f"# Speed\n\nWritten by `python -m train.benchmark`.\n\n{table(results)}"
    (args.out / "benchmark.md").write_text(report, encoding="utf-8")
    if args.record:
        write_between(Path("docs/speed.md"), "benchmark", table(results, stages=False))


if __name__ == "__main__":
    run_verb(main)
