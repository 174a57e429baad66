"""What runs the networks: ONNX Runtime on a CPU, PyTorch on a GPU and for networks that `graph` does not know.

On a CPU with AVX2, ONNX Runtime takes about half the time of PyTorch for a classifier's body and two thirds for the
segmenter, and the results differ by rounding. Heads stay with PyTorch, as heatmaps need their gradient.
"""

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .graph import UnknownOperation, to_onnx

enabled = True  # False: PyTorch runs everything
OUTPUTS = {"features": ["features"], "masks": ["logits", "deepest"]}
Run = Callable[..., list[Tensor]]
_sessions: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()
_lock = threading.Lock()


@torch.inference_mode()
def features(net: nn.Module, image: Tensor, mask: Tensor) -> Tensor:
    """`net.forward_features(image, mask)`: image (B, C, H, W) in [−1, 1], mask (B, 1, H, W) in [0, 1]."""
    session = _session(net, "features", net.forward_features, {"image": image, "mask": mask})
    return net.forward_features(image, mask) if session is None else session(image, mask)[0]


@torch.inference_mode()
def masks(segmenter: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits (B, 1, H, W) of pictures (B, 1, H, W) in [0, 1], and the deepest features (B, C, h, w)."""

    def both(image: Tensor) -> tuple[Tensor, Tensor]:
        levels = segmenter.forward_features(image)
        return segmenter.forward_head(levels), levels[-1]

    session = _session(segmenter, "masks", both, {"image": image})
    return both(image) if session is None else tuple(session(image))


def runtime_of(net: nn.Module) -> str:
    """What ran a network last, "ONNX Runtime" or "torch"; "none yet" before it was asked."""
    if net not in _sessions:
        return "none yet"
    return "torch" if None in _sessions[net].values() else "ONNX Runtime"


def _session(net: nn.Module, what: str, function: Callable, inputs: dict[str, Tensor]) -> Run | None:
    """What computes `function` by ONNX Runtime; None: PyTorch is to do it."""
    if not enabled or net.training or any(x.device.type != "cpu" for x in inputs.values()):
        return None
    version = _version(net)
    if version is None or "forward_features" in vars(net):  # somebody wants to see what happens inside
        return None
    shapes = {name: tuple(x.shape[1:]) for name, x in inputs.items()}
    cores = torch.get_num_threads()  # all for a film alone, one in each thread of `ahead`
    key = (what, cores, *shapes.values(), version)
    with _lock:
        known = _sessions.setdefault(net, {})
        if key not in known:
            for old in [other for other in known if other[-1] != version]:
                del known[old]
            known[key] = _new_session(function, shapes, OUTPUTS[what], cores)
        return known[key]


def _version(net: nn.Module) -> int | None:
    """A number that grows when weights are changed in place; None where a module has a hook.

    Asked for every picture, so it walks the modules itself: `net.modules()` and `net.parameters()` take ten times as
    long, and hold up the other threads.
    """
    version, left = 0, [net]
    while left:
        module = left.pop()
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        left.extend(child for child in module._modules.values() if child is not None)
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and not tensor.is_inference():  # the others cannot be changed
                    version += tensor._version
    return version


def _new_session(function: Callable, shapes: dict[str, tuple], outputs: list[str], cores: int) -> Run | None:
    import onnxruntime

    try:
        with torch.inference_mode(False):
            model = to_onnx(function, shapes, outputs)
    except UnknownOperation:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    options.log_severity_level = 3  # an input that a network ignores is no news
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others want the cores, too
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [known.name for known in session.get_inputs()]
    order = list(shapes)

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: tensors[order.index(name)].contiguous().numpy() for name in names}
        return [torch.from_numpy(found) for found in session.run(None, arrays)]

    return run
