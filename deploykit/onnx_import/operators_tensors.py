"""Operators on tensors that hold no weights of their own: arithmetic, moves and reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deploykit.onnx_import.graph import Array, Node
from deploykit.onnx_import.operators import UnsupportedError, integers, operator

__all__: list[str] = []

aten = torch.ops.aten

_TYPES = {
    1: torch.float32,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    11: torch.float64,
}

_UNARY: dict[str, Callable[..., Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": F.hardswish,
    "Log": torch.log,
    "Mish": F.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": F.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Silu": F.silu,  # not ONNX's: fuse.py makes it
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}

_BINARY: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Sub": torch.sub,
}


@operator(*_UNARY)
def unary(node: Node, x: Tensor) -> Tensor:
    return _UNARY[node.op](x)


@operator(*_BINARY)
def binary(node: Node, x: Any, y: Any) -> Tensor:
    if not isinstance(x, Tensor):  # a number: torch wants the tensor first
        if node.op in ("Add", "Mul"):
            x, y = y, x
        elif node.op == "Sub":
            result: Tensor = torch.rsub(y, x)
            return result
        elif node.op != "Pow":
            x = torch.full((), x, dtype=y.dtype)
    found: Tensor = _BINARY[node.op](x, y)
    return found


@operator("Div")
def divide(node: Node, x: Any, y: Any) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.reciprocal(y) if x == 1 else torch.reciprocal(y) * x
    whole = not x.is_floating_point()
    return torch.div(x, y, rounding_mode="trunc") if whole else torch.div(x, y)


@operator("Mod")
def modulo(node: Node, x: Tensor, y: Any) -> Tensor:
    return torch.fmod(x, y) if node.get("fmod", 0) else torch.remainder(x, y)


@operator("Max", "Min")
def extremes(node: Node, *values: Any) -> Tensor:
    tensors = [v if isinstance(v, Tensor) else torch.full((), v) for v in values]
    function = torch.maximum if node.op == "Max" else torch.minimum
    return functools.reduce(function, tensors)


@operator("Where")
def where(node: Node, condition: Tensor, x: Any, y: Any) -> Tensor:
    result: Tensor = torch.where(condition, x, y)
    return result


@operator("Cast")
def cast(node: Node, x: Any) -> Any:
    dtype = _TYPES.get(node.get("to"))
    if dtype is None:
        raise UnsupportedError("a cast to another type than float32, int32, int64 or bool")
    return x if x.dtype == dtype else x.to(dtype)


@operator("CastLike")
def cast_like(node: Node, x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.to(like.dtype)


@operator("Gelu")
def gelu(node: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=node.get("approximate", "none"))


@operator("LeakyRelu")
def leaky_relu(node: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, node.get("alpha", 0.01))


@operator("Elu")
def elu(node: Node, x: Tensor) -> Tensor:
    return F.elu(x, node.get("alpha", 1.0))


@operator("PRelu")
def prelu(node: Node, x: Tensor, slope: Any) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


@operator("HardSigmoid")
def hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("Clip", described=(1, 2))
def clip(node: Node, x: Tensor, low: Array | None = None, high: Array | None = None) -> Tensor:
    bounds = [None if v is None else _number(v, "bound of Clip") for v in (low, high)]
    if bounds == [None, None]:
        return x
    if bounds == [0, 6]:
        return F.relu6(x)
    return torch.clamp(x, *bounds)


@operator("Softmax", "LogSoftmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    function = torch.softmax if node.op == "Softmax" else torch.log_softmax
    if node.opset >= 13:
        return function(x, node.get("axis", -1))
    axis = node.get("axis", 1)
    if axis in (-1, x.ndim - 1):
        return function(x, -1)
    # before opset 13: over everything from the axis on
    return function(x.flatten(axis), -1).reshape(x.shape)


@operator("MatMul")
def matmul(node: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


@operator("Einsum")
def einsum(node: Node, *values: Tensor) -> Tensor:
    result: Tensor = torch.einsum(node.get("equation"), *values)
    return result


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    order = node.get("perm") or list(range(x.ndim))[::-1]
    moved = [at for at, axis in enumerate(order) if at != axis]
    if len(moved) == 2:
        return x.transpose(moved[0], moved[1])
    return x.permute(order) if moved else x


@operator("Reshape", described=(1,))
def reshape(node: Node, x: Tensor, sizes: Array) -> Tensor:
    wanted = integers(sizes, "the shape of Reshape")
    if not node.get("allowzero", 0):
        wanted = [
            x.shape[at] if isinstance(size, int) and size == 0 else size
            for at, size in enumerate(wanted)
        ]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    if axis == 1:
        return x.flatten(1)
    return x.reshape(1, -1) if axis == 0 else x.flatten(0, axis - 1).flatten(1)


@operator("Expand", described=(1,))
def expand(node: Node, x: Any, sizes: Array) -> Tensor:
    wanted = integers(sizes, "the shape of Expand")
    shape = [1] * (len(wanted) - x.ndim) + list(x.shape)
    wanted = [1] * (len(shape) - len(wanted)) + wanted
    target = [
        have if isinstance(want, int) and want == 1 else want
        for have, want in zip(shape, wanted, strict=True)
    ]
    expanded: Tensor = x.expand(target)
    return expanded


@operator("Tile", described=(1,))
def tile(node: Node, x: Tensor, repeats: Array) -> Tensor:
    return x.repeat(integers(repeats, "repeats of Tile"))


@operator("Concat")
def concat(node: Node, *parts: Tensor) -> Tensor:
    return torch.cat(parts, node.get("axis"))


@operator("Split", described=(1,))
def split(node: Node, x: Tensor, sizes: Array | None = None) -> tuple[Tensor, ...]:
    axis = node.get("axis", 0)
    lengths = node.get("split") if sizes is None else integers(sizes, "sizes of Split")
    if lengths is None:
        return torch.chunk(x, len(node.outputs), axis)
    if len(set(lengths)) == 1:
        return torch.split(x, lengths[0], axis)
    return torch.split(x, list(lengths), axis)


@operator("Slice", described=(1, 2, 3, 4))
def slice_(
    node: Node,
    x: Tensor,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Tensor:
    begin, end = integers(starts, "starts of Slice"), integers(ends, "ends of Slice")
    where = range(len(begin)) if axes is None else integers(axes, "axes of Slice")
    step = [1] * len(begin) if steps is None else integers(steps, "steps of Slice")
    for axis, first, last, stride in zip(where, begin, end, step, strict=True):
        if stride < 0:
            whole = first in (-1, x.shape[axis] - 1) or first >= x.shape[axis]
            if stride != -1 or not whole or last >= -x.shape[axis]:
                raise UnsupportedError("a Slice that runs backwards over a part")
            x = x.flip(axis)
        else:
            x = aten.slice.Tensor(x, axis, first, last, stride)
    return x


@operator("Gather")
def gather(node: Node, x: Tensor, index: Any) -> Tensor:
    axis = node.get("axis", 0)
    axis = axis + x.ndim if axis < 0 else axis
    if isinstance(index, int):
        return x.select(axis, index)
    index = torch.where(index < 0, index + x.shape[axis], index)
    flat = torch.index_select(x, axis, index.reshape(-1))
    return flat.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operator("Unsqueeze", described=(1,))
def unsqueeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    where = node.get("axes") if axes is None else integers(axes, "axes of Unsqueeze")
    rank = x.ndim + len(where)
    for axis in sorted(a + rank if a < 0 else a for a in where):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze", described=(1,))
def squeeze(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    where = node.get("axes") if axes is None else integers(axes, "axes of Squeeze")
    if where is None:
        raise UnsupportedError("a Squeeze without axes")
    return x.squeeze(where[0]) if len(where) == 1 else x.squeeze(list(where))


_REDUCE: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keep),
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keep),
    "ReduceSum": lambda x, axes, keep: torch.sum(x, axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keep),
}


@operator(*_REDUCE, described=(1,))
def reduce_(node: Node, x: Tensor, axes: Array | None = None) -> Tensor:
    where = node.get("axes") if axes is None else integers(axes, "axes of a reduction")
    if where is None:
        if node.get("noop_with_empty_axes", 0):
            return x
        where = list(range(x.ndim))
    return _REDUCE[node.op](x, list(where), bool(node.get("keepdims", 1)))


@operator("Pad", described=(1, 2, 3))
def pad(
    node: Node,
    x: Tensor,
    pads: Array,
    value: Array | None = None,
    axes: Array | None = None,
) -> Tensor:
    around = integers(pads, "pads of Pad")
    where = range(x.ndim) if axes is None else integers(axes, "axes of Pad")
    widths = [(0, 0)] * x.ndim
    half = len(around) // 2
    for at, axis in enumerate(where):
        widths[axis] = (around[at], around[half + at])
    while widths and widths[0] == (0, 0):  # torch counts from the last dimension
        widths.pop(0)
    flat = [width for pair in reversed(widths) for width in pair]
    mode = {"edge": "replicate"}.get(node.get("mode", "constant"), node.get("mode", "constant"))
    if not flat:
        return x
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else _number(value, "value of Pad"))
    return F.pad(x, flat + [0] * (2 * x.ndim - 4 - len(flat)), mode=mode)  # all sides at once


@operator("DepthToSpace", "SpaceToDepth")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    block = node.get("blocksize")
    if node.op == "DepthToSpace" and node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, block)
    raise UnsupportedError(f"operator {node.op} in mode {node.get('mode', 'DCR')}")


def _number(value: Any, what: str) -> Any:
    if not isinstance(value, np.ndarray):
        raise UnsupportedError(f"a {what} that depends on the image")
    return value.reshape(()).item()
