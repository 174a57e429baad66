"""What runs the networks: ONNX Runtime on a CPU, PyTorch on a GPU and for networks that `networks.graph` does not know.

On a CPU with AVX2, ONNX Runtime takes about half the time of PyTorch for a classifier's body and two thirds for the
segmenter, and the results differ by rounding. Heads stay with PyTorch, as heatmaps need their gradient.
"""

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .networks.graph import UnknownOperation, to_onnx

enabled = True  # False: PyTorch runs everything
_CORES = torch.get_num_threads()  # of a whole network; in a thread of `ahead`, PyTorch itself has one
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
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    if hooked or "forward_features" in vars(net):  # somebody wants to see what happens inside
        return None
    shapes = {name: tuple(x.shape[1:]) for name, x in inputs.items()}
    # weights that were changed since, in place, are other weights
    tensors = (*net.parameters(), *net.buffers())
    version = sum(tensor._version for tensor in tensors if not tensor.is_inference())  # the others cannot be changed
    key = (what, *shapes.values(), version)
    with _lock:
        known = _sessions.setdefault(net, {})
        if key not in known:
            for old in [other for other in known if other[-1] != version]:
                del known[old]
            known[key] = _new_session(function, shapes, OUTPUTS[what])
        return known[key]


def _new_session(function: Callable, shapes: dict[str, tuple], outputs: list[str]) -> Run | None:
    import onnxruntime

    try:
        with torch.inference_mode(False):
            model = to_onnx(function, shapes, outputs)
    except UnknownOperation:
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _CORES
    options.log_severity_level = 3  # an input that a network ignores is no news
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # others want the cores, too
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [known.name for known in session.get_inputs()]
    order = list(shapes)

    def run(*tensors: Tensor) -> list[Tensor]:
        arrays = {name: tensors[order.index(name)].contiguous().numpy() for name in names}
        return [torch.from_numpy(found) for found in session.run(None, arrays)]

    return run
