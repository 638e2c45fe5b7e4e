"""Operators on arrays of sizes, in numpy. Elements may be torch's symbolic integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploykit.onnx_import.graph import Array, Node
from deploykit.onnx_import.operators import UnsupportedError, integers, on_shapes, operator

__all__: list[str] = []

_TYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 11: np.float64}
_MOST = 2**26  # elements of an array made from nothing but a shape


@operator("Shape")
def shape(node: Node, x: Tensor) -> Array:
    sizes = list(x.shape)[node.get("start", 0) : node.get("end", x.ndim)]
    plain = all(isinstance(size, int) for size in sizes)
    return np.array(sizes, np.int64 if plain else object)


@on_shapes("Shape")
def shape_of_shape(node: Node, x: Array) -> Array:
    return np.array(x.shape[node.get("start", 0) : node.get("end", x.ndim)], np.int64)


@operator("Size")
def size_of(node: Node, x: Tensor) -> Array:
    return np.array(x.numel())


@on_shapes("Cast")
def cast(node: Node, x: Array) -> Array:
    to = _TYPES.get(node.get("to"))
    if to is None:
        raise UnsupportedError("a cast to another type than float32, int32, int64 or bool")
    if x.dtype == object and np.issubdtype(to, np.integer):
        return x  # symbolic sizes are integers already
    return x.astype(to)


@on_shapes("Gather")
def gather(node: Node, x: Array, index: Array) -> Array:
    return np.asarray(np.take(x, index.astype(np.int64), axis=node.get("axis", 0)))


@on_shapes("Unsqueeze")
def unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    where = node.get("axes") if axes is None else integers(axes, "axes of Unsqueeze")
    return np.expand_dims(x, tuple(where))


@on_shapes("Squeeze")
def squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    where = node.get("axes") if axes is None else integers(axes, "axes of Squeeze")
    return np.squeeze(x, None if where is None else tuple(where))


@on_shapes("Concat")
def concat(node: Node, *parts: Array) -> Array:
    return np.concatenate([np.asarray(part) for part in parts], node.get("axis"))


@on_shapes("Slice")
def slice_(
    node: Node,
    x: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    begin, end = integers(starts, "starts of Slice"), integers(ends, "ends of Slice")
    where = range(len(begin)) if axes is None else integers(axes, "axes of Slice")
    step = [1] * len(begin) if steps is None else integers(steps, "steps of Slice")
    index: list[Any] = [slice(None)] * x.ndim
    for axis, first, last, stride in zip(where, begin, end, step, strict=True):
        stop = None if stride < 0 and last < -x.shape[axis] else last
        index[axis] = slice(first, stop, stride)
    return np.asarray(x[tuple(index)])


@on_shapes("Reshape")
def reshape(node: Node, x: Array, sizes: Array) -> Array:
    wanted = integers(sizes, "the shape of Reshape")
    if not node.get("allowzero", 0):
        wanted = [x.shape[at] if size == 0 else size for at, size in enumerate(wanted)]
    return x.reshape(wanted)


@on_shapes("Transpose")
def transpose(node: Node, x: Array) -> Array:
    return np.transpose(x, node.get("perm"))


@on_shapes("Split")
def split(node: Node, x: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    axis = node.get("axis", 0)
    lengths = node.get("split") if sizes is None else integers(sizes, "sizes of Split")
    if lengths is None:
        return tuple(np.array_split(x, len(node.outputs), axis))
    return tuple(np.split(x, np.cumsum(lengths)[:-1], axis))


@operator("ConstantOfShape", described=(0,))
def constant_of_shape(node: Node, sizes: Array) -> Array | Tensor:
    value = node.get("value")
    fill = np.zeros(1, np.float32) if value is None else value
    wanted = integers(sizes, "the shape of ConstantOfShape")
    if not all(isinstance(size, int) for size in wanted):
        return torch.full(wanted, fill.item(), dtype=torch.from_numpy(fill).dtype)
    _check_count(wanted)
    return np.full(wanted, fill.item(), fill.dtype)


@on_shapes("Range")
def range_(node: Node, start: Array, limit: Array, delta: Array) -> Array | Tensor:
    first, last, step = (value.reshape(()).item() for value in (start, limit, delta))
    if not all(isinstance(value, (int, float)) for value in (first, last, step)):
        return torch.arange(first, last, step)  # as long as the batch
    if step == 0:
        raise UnsupportedError("a Range whose step is 0")
    _check_count([abs(int((last - first) / step))])
    return np.arange(first, last, step, dtype=start.dtype)


@on_shapes("Expand")
def expand(node: Node, x: Array, sizes: Array) -> Array:
    wanted = integers(sizes, "the shape of Expand")
    if not all(isinstance(size, int) for size in wanted):
        raise UnsupportedError("an array of sizes expanded by the batch")
    shape = np.broadcast_shapes(x.shape, tuple(wanted))
    _check_count(list(shape))
    return np.array(np.broadcast_to(x, shape))


@on_shapes("Tile")
def tile(node: Node, x: Array, repeats: Array) -> Array:
    times = integers(repeats, "repeats of Tile")
    _check_count([n * t for n, t in zip(x.shape, times, strict=True)])
    return np.tile(x, times)


@on_shapes("Where")
def where(node: Node, condition: Array, x: Array, y: Array) -> Array:
    return np.where(condition.astype(bool), x, y)


@on_shapes("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual")
def compare(node: Node, x: Array, y: Array) -> Array:
    return np.asarray(_COMPARE[node.op](x, y)).astype(bool)


@on_shapes("Div")
def divide(node: Node, x: Array, y: Array) -> Array:
    if object in (x.dtype, y.dtype):
        return np.asarray(x // y)  # sizes are positive, where floor and truncation agree
    if np.issubdtype(x.dtype, np.integer):
        return np.asarray(np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)))
    return np.asarray(x / y)


@on_shapes("Add", "Sub", "Mul", "Max", "Min", "Mod", "Pow", "And", "Or")
def binary(node: Node, *values: Array) -> Array:
    function = _BINARY[node.op]
    result = values[0]
    for value in values[1:]:
        result = np.asarray(function(result, value))
    return result


@on_shapes("Neg", "Sqrt", "Floor", "Ceil", "Not", "Abs", "Exp", "Log", "Sin", "Cos")
def unary(node: Node, x: Array) -> Array:
    if x.dtype == object and node.op != "Neg":
        raise UnsupportedError(f"operator {node.op} on a size that depends on the batch")
    return np.asarray(_UNARY[node.op](x))


@on_shapes("Reciprocal")
def reciprocal(node: Node, x: Array) -> Array:
    return np.asarray(1 / x)


@on_shapes("ReduceProd", "ReduceSum", "ReduceMax", "ReduceMin")
def reduce_(node: Node, x: Array, axes: Array | None = None) -> Array:
    where = node.get("axes") if axes is None else integers(axes, "axes of a reduction")
    over = None if where is None else tuple(where)
    return np.asarray(_REDUCE[node.op](x, axis=over, keepdims=bool(node.get("keepdims", 1))))


_COMPARE: dict[str, Callable[..., Any]] = {
    "Equal": np.equal,
    "Less": np.less,
    "Greater": np.greater,
    "LessOrEqual": np.less_equal,
    "GreaterOrEqual": np.greater_equal,
}
_BINARY: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mod": np.mod,
    "Pow": np.power,
    "And": np.logical_and,
    "Or": np.logical_or,
}
_UNARY: dict[str, Callable[..., Any]] = {
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Not": np.logical_not,
    "Abs": np.abs,
    "Exp": np.exp,
    "Log": np.log,
    "Sin": np.sin,
    "Cos": np.cos,
}
_REDUCE: dict[str, Callable[..., Any]] = {
    "ReduceProd": np.prod,
    "ReduceSum": np.sum,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
}


def _check_count(sizes: list[int]) -> None:
    count = 1
    for size in sizes:
        count *= size
    if not 0 <= count <= _MOST or any(size < 0 for size in sizes):
        raise UnsupportedError(f"an array of {count} elements made from its shape alone")
