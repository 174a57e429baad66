"""A network as an ONNX graph, which other programs can run, and ONNX Runtime faster than PyTorch does on a CPU.

The network is called once with tensors that have shapes and no values (PyTorch's "meta" device); each function that it
calls becomes a node. That is quick enough, unlike `torch.onnx.export`, to be done whenever networks are loaded: no
files are to be kept beside the weights. Only what the networks of this package call is known; all else is refused.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

OPSET = 18
BATCH = "batch"  # name of the free axis


class UnknownOperation(NotImplementedError):
    """The network does something for which no ONNX node is known here; its text names it."""


def to_onnx(function: Callable[..., Tensor | Sequence[Tensor]], inputs: dict[str, tuple], outputs: Sequence[str]):
    """The ONNX model (`onnx.ModelProto`, opset `OPSET`) of what a function of tensors computes.

    Args:
        function: in evaluation mode, float32; called with one tensor an input, in their order.
        inputs: {name: (C, H, W)} float32; the batch before them is free.
        outputs: names of what it returns.

    Raises:
        UnknownOperation: it calls what is not known here.
    """
    from onnx import TensorProto, helper

    tape = _Tape()
    given = [tape.name(torch.empty(2, *shape, device="meta"), name) for name, shape in inputs.items()]
    with torch.no_grad(), tape:
        found = function(*given)
    found = [found] if isinstance(found, Tensor) else list(found)
    for tensor, name in zip(found, outputs, strict=True):
        tape.nodes.append(helper.make_node("Identity", [tape.of(tensor)], [name]))
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [BATCH, *tensor.shape[1:]]) for tensor, name in pairs]
        for pairs in (zip(given, inputs), zip(found, outputs))
    ]
    graph = helper.make_graph(tape.nodes, "MANet", *values, tape.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)


class _Tape(TorchFunctionMode):
    """Writes a node for each function of tensors that is called while it is active."""

    def __init__(self):
        super().__init__()
        self.nodes, self.constants = [], []
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # or the id of one that is gone might be given to another

    def name(self, tensor: Tensor, name: str) -> Tensor:
        """Call the present value of a tensor so; of one that was changed in place, the new value."""
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        return tensor

    def of(self, value: Tensor | float) -> str:
        """The name of a tensor, or of a constant: a parameter, or a number."""
        if isinstance(value, Tensor) and id(value) in self._names:
            return self._names[id(value)]
        if isinstance(value, Tensor):
            if value.device.type == "meta":
                raise UnknownOperation("a tensor from nowhere")
            name = self.constant(value.detach().float().contiguous().numpy())
            self.name(value, name)
            return name
        return self.constant(np.float32(value))

    def constant(self, value: np.ndarray) -> str:
        """The name of a new constant."""
        from onnx import numpy_helper

        name = f"constant{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes) -> str:
        """Add a node; returns its output's name."""
        from onnx import helper

        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        title = getattr(function, "__name__", str(function))
        if title in _ASKED:
            answer = function(*args, **kwargs)
            if isinstance(answer, Tensor):
                raise UnknownOperation(title)
            return answer
        if (write := _WRITERS.get(_DISPATCHED.get(function, title))) is None:
            raise UnknownOperation(title)
        try:
            name = write(self, *args, **kwargs)
        except TypeError:  # an argument that the writer does not take
            raise UnknownOperation(f"{title} with these arguments") from None
        if shape := _QUICK.get(title):  # PyTorch itself takes a millisecond to tell
            return self.name(torch.empty(shape(*args, **kwargs), device="meta"), name)
        return self.name(function(*_shapes(args), **_shapes(kwargs)), name)


_ASKED = ("__get__", "dim", "size", "_assert")  # what tells of a tensor and makes none
_DISPATCHED = {F.max_pool2d: "max_pool2d", F.adaptive_max_pool2d: "adaptive_max_pool2d"}  # all have one name


def _shapes(values):
    """The same arguments, parameters without their values: they lie on another device than "meta"."""
    if isinstance(values, Tensor):
        return values if values.device.type == "meta" else torch.empty_like(values, device="meta")
    if isinstance(values, dict):
        return {key: _shapes(value) for key, value in values.items()}
    return type(values)(_shapes(value) for value in values) if isinstance(values, tuple | list) else values


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _conv2d(t: _Tape, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    attributes = {"strides": _pair(stride), "dilations": _pair(dilation), "group": groups}
    inputs = [t.of(x), t.of(weight)] + ([] if bias is None else [t.of(bias)])
    return t.node("Conv", *inputs, pads=_pair(padding) * 2, **attributes)


def _batch_norm(t: _Tape, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training or weight is None or bias is None:
        raise UnknownOperation("batch norm in training, or without weights")
    return t.node("BatchNormalization", *map(t.of, (x, weight, bias, mean, var)), epsilon=eps)


def _max_pool2d(t: _Tape, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if return_indices:
        raise UnknownOperation("max pooling that tells places")
    return t.node("MaxPool", t.of(x), **_pooling(kernel_size, stride, padding, ceil_mode), dilations=_pair(dilation))


def _avg_pool2d(t: _Tape, x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True):
    attributes = _pooling(kernel_size, stride, padding, ceil_mode)
    return t.node("AveragePool", t.of(x), **attributes, count_include_pad=int(count_include_pad))


def _pooling(kernel, stride, padding, ceil_mode) -> dict:
    strides = _pair(kernel if stride is None else stride)
    return {
        "kernel_shape": _pair(kernel),
        "strides": strides,
        "pads": _pair(padding) * 2,
        "ceil_mode": int(ceil_mode),
    }


def _adaptive(kind: str) -> Callable[..., str]:
    def write(t: _Tape, x, size, return_indices=False):
        if _pair(size) != [1, 1] or return_indices:
            raise UnknownOperation("adaptive pooling to more than one pixel")
        return t.node(kind, t.of(x))

    return write


def _reduce(kind: str) -> Callable[..., str]:
    def write(t: _Tape, x, dim, keepdim=False):
        axes = t.constant(np.array(dim if isinstance(dim, tuple | list) else [dim], np.int64))
        return t.node(kind, t.of(x), axes, keepdims=int(keepdim))

    return write


def _binary(kind: str) -> Callable[..., str]:
    return lambda t, x, y: t.node(kind, t.of(x), t.of(y))


def _unary(kind: str) -> Callable[..., str]:
    return lambda t, x, inplace=False: t.node(kind, t.of(x))


def _clamp(t: _Tape, x, min=None, max=None):
    return t.node("Clip", *("" if value is None else t.of(value) for value in (x, min, max)))


def _hardtanh(t: _Tape, x, min_val=-1.0, max_val=1.0, inplace=False):
    return _clamp(t, x, min_val, max_val)


def _interpolate(t: _Tape, x, size=None, scale_factor=None, mode="nearest", **others):
    if mode != "nearest" or size is None or any(others.values()):
        raise UnknownOperation(f"{mode} interpolation")
    scales = np.array([1, 1, *np.divide(_pair(size), x.shape[-2:])], np.float32)
    how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return t.node("Resize", t.of(x), "", t.constant(scales), **how)


def _getitem(t: _Tape, x, index):
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) and part.step is None for part in index):
        raise UnknownOperation("an index that is no slice")
    end = np.iinfo(np.int64).max
    bounds = np.array([(p.start or 0, end if p.stop is None else p.stop) for p in index], np.int64)
    starts, ends, axes = map(t.constant, (*bounds.T.copy(), np.arange(len(index))))
    return t.node("Slice", t.of(x), starts, ends, axes)


def _new_ones(t: _Tape, x, *shape):
    return t.constant(np.ones(shape, np.float32))


def _to(t: _Tape, x, dtype):
    if dtype is not torch.float32:
        raise UnknownOperation(f"a tensor of {dtype}")
    return t.node("Identity", t.of(x))


def _linear(t: _Tape, x, weight, bias=None):
    return t.node("Gemm", t.of(x), t.of(weight), *([] if bias is None else [t.of(bias)]), transB=1)


def _flatten(t: _Tape, x, start_dim=0):
    if start_dim != 1:
        raise UnknownOperation("flattening a batch")
    return t.node("Flatten", t.of(x), axis=1)


def _dropout(t: _Tape, x, p=0.5, training=True, inplace=False):
    if training:
        raise UnknownOperation("dropout in training")
    return t.node("Identity", t.of(x))


def _behind_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> list[int]:
    settings = zip(x.shape[2:], weight.shape[2:], _pair(stride), _pair(padding), _pair(dilation))
    sides = [(side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, gap in settings]
    return [x.shape[0], weight.shape[0], *sides]


_QUICK: dict[str, Callable[..., Sequence[int]]] = {
    "conv2d": _behind_conv2d,
    "batch_norm": lambda x, *others, **options: x.shape,
}
_WRITERS: dict[str, Callable[..., str]] = {
    "conv2d": _conv2d,
    "batch_norm": _batch_norm,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "adaptive_avg_pool2d": _adaptive("GlobalAveragePool"),
    "adaptive_max_pool2d": _adaptive("GlobalMaxPool"),
    "mean": _reduce("ReduceMean"),
    "amax": _reduce("ReduceMax"),
    "add": _binary("Add"),
    "add_": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "mul_": _binary("Mul"),
    "div": _binary("Div"),
    "relu": _unary("Relu"),
    "relu6": lambda t, x, inplace=False: _clamp(t, x, 0.0, 6.0),
    "hardtanh": _hardtanh,
    "sigmoid": _unary("Sigmoid"),
    "clamp": _clamp,
    "cat": lambda t, tensors, dim=0: t.node("Concat", *map(t.of, tensors), axis=dim),
    "interpolate": _interpolate,
    "__getitem__": _getitem,
    "new_ones": _new_ones,
    "to": _to,
    "linear": _linear,
    "flatten": _flatten,
    "dropout": _dropout,
}
