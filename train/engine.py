"""The training loop that `train.segment` and `train.classify` share.

One call of `fit` trains, logs, checkpoints after every epoch, and goes on from
the last checkpoint when it is started again; `accelerate launch` spreads it
over several GPUs unchanged.
"""

import csv
import ctypes
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from .recipe import Recipe, Run

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


class EpochSampler(Sampler):
    """A random order that depends on (seed, epoch) alone, the same in every process.

    With `weights` (one a row), rows are drawn with replacement in proportion to them; where they are `numbered`, a row
    that comes for the k-th time has k − 1 times the length added, so that it can be augmented another way.
    """

    def __init__(self, length: int, seed: int, weights: Tensor | None = None, numbered: bool = False):
        self.length, self.seed, self.weights, self.numbered, self.epoch = length, seed, weights, numbered, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.weights is None:
            return iter(torch.randperm(self.length, generator=generator).tolist())
        drawn = torch.multinomial(self.weights, self.length, replacement=True, generator=generator).tolist()
        if self.numbered:
            before: Counter = Counter()
            for place, row in enumerate(drawn):
                drawn[place] += self.length * before[row]
                before[row] += 1
        return iter(drawn)


def start_from(net: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Copy the weights that fit into `net`; returns the names in `net` that stay as they were.

    CBAM that is put into a network trained without it starts as the identity. Its
    gates begin at one half each, which would weaken every block to a quarter and
    undo what was learnt: so they begin at exactly one half, and the batch norm
    before them is made four times as large.
    """
    own = net.state_dict()
    fitting = {name: w for name, w in weights.items() if name in own and own[name].shape == w.shape}
    net.load_state_dict(fitting, strict=False)
    untouched = [name for name in own if name not in fitting]
    if any("cbam." in name for name in untouched):
        net.start_cbam_as_identity()
    return untouched


def save_weights(net: nn.Module, path: Path, keep: Callable[[dict], dict] = dict) -> None:
    """Write float32 weights, those of the state dict that `keep` returns; the file has its name once it is complete."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in keep(net.state_dict()).items()}
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def autocast(recipe: Recipe, device: torch.device) -> bool:
    """Whether `recipe` computes in bf16 on `device`: "auto" does where the hardware has it."""
    if recipe.precision != "auto":
        return recipe.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextmanager
def training_precision(bf16: bool, device: torch.device) -> Iterator[None]:
    """In it, the forward pass and the loss of a training step are computed in bf16 where that is faster, if `bf16`."""
    mixed = DepthwiseInFloat32() if bf16 and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16), mixed:
        yield


class DepthwiseInFloat32(TorchFunctionMode):
    """While active, 5×5 and strided depthwise convolutions under a CPU's autocast are computed in float32.

    The backward pass of their bf16 version is up to nine times slower (torch 2.15).
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and torch.is_autocast_enabled("cpu") and _slow_in_bf16(*args, **(kwargs or {})):
            image, *others = args
            with torch.autocast("cpu", enabled=False):
                return function(image.float(), *others, **(kwargs or {})).to(torch.get_autocast_dtype("cpu"))
        return function(*args, **(kwargs or {}))


def _slow_in_bf16(image: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
    strides = (stride,) if isinstance(stride, int) else stride
    return 1 < groups == weight.shape[0] and (max(weight.shape[2:]) > 3 or max(strides) > 1)


def memory_format(recipe: Recipe, device: torch.device) -> torch.memory_format:
    """The layout of pictures and weights that trains fastest on `device`.

    On a CPU in float32 the backward pass of narrow 1×1 convolutions corrupts memory in channels_last (torch 2.15).
    """
    fast = device.type == "cuda" or autocast(recipe, device)
    return torch.channels_last if fast else torch.contiguous_format


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep the large blocks that a training step on a CPU frees, for the next step.

    The C library of most Linux systems (glibc) gives each back to the kernel, which clears it page by page when it is
    asked for again: up to half the time of a step. On other systems and devices nothing is done.
    """
    if device.type == "cpu" and sys.platform == "linux" and (tune := getattr(ctypes.CDLL(None), "mallopt", None)):
        for setting in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            tune(setting, 2**31 - 1)


def fit(
    recipe: Recipe,
    run: Run,
    net: nn.Module,
    train_set: Dataset,
    loss: Callable[[nn.Module, tuple], Tensor],
    validate: Callable[[nn.Module, torch.device], dict[str, float]],
    draw: Tensor | None = None,
    keep: Callable[[dict], dict] = dict,
) -> dict:
    """Train `net`; leave out/best.safetensors, out/log.csv and out/result.json behind.

    Args:
        recipe: what is learnt; `recipe.select` names the figure whose best value chooses the epoch that is kept, the
            first of equals.
        run: where to write and what computes.
        net: moved to the device and to its `memory_format` here.
        train_set: reads its attribute `epoch`.
        loss: (net, batch) -> scalar.
        validate: (net, device) -> figures, after every epoch, on the main process.
        draw: weights (len(train_set),) with which pictures are drawn; None: each once an epoch.
        keep: state dict -> what best.safetensors holds of it.

    Returns:
        The content of result.json: the figures of the best epoch, its number, seconds.

    Raises:
        SystemExit: `run.out` holds a training with other settings, the loss is no
            longer a number, or Ctrl-C was pressed.
    """
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision="bf16" if autocast(recipe, device_of(run)) else "no",
        cpu=run.device == "cpu",
        dataloader_config=DataLoaderConfiguration(split_batches=True),  # a batch is shared by all processes
    )
    set_seed(recipe.seed, device_specific=True)  # of two processes, each drops out what it draws
    device = accelerator.device
    keep_freed_memory(device)
    if recipe.batch % accelerator.num_processes:
        raise SystemExit(
            f"--batch {recipe.batch} cannot be shared by {accelerator.num_processes} processes: change it."
        )
    settings = asdict(recipe) | {"data": run.data}
    if accelerator.is_main_process:
        _check_settings(out / "settings.json", settings)

    net = net.to(memory_format=memory_format(recipe, device))
    if recipe.init:
        untouched = start_from(net, load_file(recipe.init))
        accelerator.print(
            f"started from {recipe.init}; as initialised: {len(untouched)} of {len(net.state_dict())} tensors"
        )
    if device.type == "cuda" and accelerator.num_processes > 1:
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)  # statistics of the whole batch, as with one GPU
    optimizer = _optimizer(recipe, net)
    batched = hasattr(train_set, "__getitems__")  # such a set gives whole batches, where it keeps them
    sampler = EpochSampler(len(train_set), recipe.seed, draw, numbered=not batched)
    loader = DataLoader(
        train_set,
        recipe.batch,
        sampler=sampler,
        drop_last=True,
        num_workers=0 if batched else run.workers,
        pin_memory=device.type == "cuda" and not batched,
        collate_fn=list if batched else None,
    )
    if len(loader) == 0:
        raise SystemExit(f"There are {len(train_set)} training pictures, fewer than --batch {recipe.batch}: lower it.")
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    if run.compile:
        model = torch.compile(model)  # `net` shares its weights, under the names that are saved
    scheduler = _scheduler(recipe, optimizer, recipe.epochs * len(loader))
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema)) if recipe.ema else None
    kept = average.module if average else net  # what is validated and saved

    checkpoint, history, first, seconds = out / "last.ckpt", [], 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        net.load_state_dict(state["net"])
        if average:
            average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
        first, history, seconds = state["epoch"], state["history"], state["seconds"]
        accelerator.print(f"resuming after epoch {first}")

    try:
        for epoch in range(recipe.epochs if ended(history, recipe) else first, recipe.epochs):
            start = time.perf_counter()
            sampler.epoch = epoch
            train_set.epoch = epoch  # no `set_epoch`: accelerate would call it with a count that a resumption resets
            bar = tqdm(
                loader, f"epoch {epoch + 1}/{recipe.epochs}", disable=not accelerator.is_main_process, mininterval=5
            )
            mean_loss = _train_epoch(accelerator, model, bar, loss, optimizer, scheduler, average, net)
            seconds += time.perf_counter() - start
            if accelerator.is_main_process:
                kept.eval()
                row = {"epoch": epoch + 1, "lr": scheduler.get_last_lr()[0], "train_loss": mean_loss}
                row |= validate(kept, device) | {"seconds": round(seconds, 1)}
                history.append(row)
                accelerator.print({k: round(v, 4) for k, v in row.items()})
                if best_of(history, recipe) is row:
                    save_weights(kept, out / "best.safetensors", keep)
                _write_log(out / "log.csv", history)
                state = {
                    "net": net.state_dict(),
                    "average": average.state_dict() if average else None,
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "epoch": epoch + 1,
                    "history": history,
                    "seconds": seconds,
                    "rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                }
                torch.save(state, checkpoint.with_suffix(".part"))
                checkpoint.with_suffix(".part").replace(checkpoint)
            accelerator.wait_for_everyone()
            if accelerator.gather(torch.tensor([ended(history, recipe)], device=device)).any():
                break
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the same command goes on after the last finished epoch.") from None

    result = {}
    if accelerator.is_main_process:
        best = best_of(history, recipe)
        result = {"validation": best, "settings": settings, "device": str(device), "seconds": seconds}
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def best_of(history: list[dict], recipe: Recipe) -> dict:
    """The row of the epoch that `recipe.select` chooses; rows as `fit` logs them, one an epoch."""
    return (min if recipe.select == "val_loss" else max)(history, key=lambda row: row[recipe.select])


def ended(history: list[dict], recipe: Recipe) -> bool:
    """Whether `recipe.patience` is at its end."""
    return bool(recipe.patience and history) and len(history) - best_of(history, recipe)["epoch"] >= recipe.patience


def device_of(run: Run) -> torch.device:
    """Where a run computes: CUDA when present, each of several processes on its own; unless it asks for the CPU."""
    if run.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _train_epoch(accelerator, model, bar, loss, optimizer, scheduler, average, net) -> float:
    """One pass over the loader behind `bar`; the mean loss of all processes."""
    model.train()
    total = torch.zeros((), device=accelerator.device)
    for step, batch in enumerate(bar):
        with training_precision(accelerator.mixed_precision == "bf16", accelerator.device):
            value = loss(model, batch)
        accelerator.backward(value)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(net)
        total += value.detach()
        if step % 20 == 19:
            bar.set_postfix(loss=f"{total.item() / (step + 1):.4f}")
    mean = accelerator.reduce(total, "mean").item() / len(bar)
    if not math.isfinite(mean):
        raise SystemExit("The loss is no longer a number; start again in another --out with a lower --lr.")
    return mean


def _check_settings(path: Path, settings: dict) -> None:
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    if changed := sorted(k for k in settings.keys() | old.keys() if settings.get(k) != old.get(k)):
        raise SystemExit(f"{path.parent} holds a training with another {', '.join(changed)}: choose another --out.")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _optimizer(recipe: Recipe, net: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(net.parameters(), recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def _scheduler(recipe: Recipe, optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    if recipe.schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=max(steps, 2))
    if recipe.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def _write_log(path: Path, history: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
