"""What each MIL operator computes, in torch.

Floats are float32 tensors, integers int32 tensors, truths bool tensors and texts ``str``. The
meaning of each is in coremltools' "MIL Ops" reference. Operators of layers are in
``mil_layers``, which fills the same table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["OPERATORS", "Call", "mil_op"]


class Call:
    """One operator and the values of its arguments."""

    def __init__(self, op: Any, arguments: dict[str, Any]) -> None:
        self.op = op
        self._arguments = arguments

    def get(self, name: str) -> Any:
        """The argument as it is, or None."""
        return self._arguments.get(name)

    def tensor(self, name: str) -> Tensor:
        value = self._arguments[name]
        assert isinstance(value, Tensor), name
        return value

    def tensors(self, name: str) -> list[Tensor]:
        value = self._arguments[name]
        assert isinstance(value, list), name
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self.get(name)
        return default if value is None else str(value)

    def number(self, name: str, default: float = 0.0) -> float:
        value = self.get(name)
        return default if value is None else float(value)

    def integer(self, name: str, default: int = 0) -> int:
        value = self.get(name)
        return default if value is None else int(value)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        return value is not None and bool(value)

    def integers(self, name: str) -> list[int]:
        """A list of integers; empty where the argument isn't given."""
        value = self.get(name)
        return [] if value is None else [int(item) for item in value.reshape(-1).tolist()]


Result = Tensor | list[Tensor]
Operator = Callable[[Call], Result]
OPERATORS: dict[str, Operator] = {}


def mil_op(*names: str) -> Callable[[Operator], Operator]:
    """Decorator: the function computes the operators of these names."""

    def register(function: Operator) -> Operator:
        for name in names:
            OPERATORS[name] = function
        return function

    return register


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "identity": lambda x: x,
    "logical_not": torch.logical_not,
    "relu": F.relu,
    "relu6": F.relu6,
    "round": torch.round,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "silu": F.silu,
    "sin": torch.sin,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tanh": torch.tanh,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "sub": torch.sub,
}

_REDUCE: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "reduce_l2_norm": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "reduce_max": lambda x, axes, keep: torch.amax(x, axes, keep),
    "reduce_mean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "reduce_min": lambda x, axes, keep: torch.amin(x, axes, keep),
    "reduce_sum": lambda x, axes, keep: torch.sum(x, axes, keep),
}


@mil_op(*_UNARY)
def _unary(call: Call) -> Tensor:
    return _UNARY[call.op.op_type](call.tensor("x"))


@mil_op(*_BINARY)
def _binary(call: Call) -> Tensor:
    return _BINARY[call.op.op_type](call.tensor("x"), call.tensor("y"))


@mil_op(*_REDUCE)
def _reduce(call: Call) -> Tensor:
    x = call.tensor("x")
    axes = call.integers("axes") or list(range(x.ndim))
    return _REDUCE[call.op.op_type](x, axes, call.flag("keep_dims"))


@mil_op("real_div")
def _real_div(call: Call) -> Tensor:
    x, y = call.tensor("x"), call.tensor("y")
    if not x.is_floating_point():  # MIL divides integers downwards
        return torch.div(x, y, rounding_mode="floor")
    return x / y


@mil_op("rsqrt")
def _rsqrt(call: Call) -> Tensor:
    return torch.rsqrt(call.tensor("x") + call.number("epsilon", 1e-12))


@mil_op("inverse")
def _inverse(call: Call) -> Tensor:
    return torch.reciprocal(call.tensor("x") + call.number("epsilon", 1e-4))


@mil_op("log")
def _log(call: Call) -> Tensor:
    return torch.log(call.tensor("x") + call.number("epsilon", 1e-45))


@mil_op("clip")
def _clip(call: Call) -> Tensor:
    return call.tensor("x").clamp(call.number("alpha"), call.number("beta"))


@mil_op("cast")
def _cast(call: Call) -> Tensor:
    kind = call.text("dtype")
    if kind.startswith("fp"):
        return call.tensor("x").float()
    return call.tensor("x").to(torch.bool if kind == "bool" else torch.int32)


@mil_op("select")
def _select(call: Call) -> Tensor:
    return torch.where(call.tensor("cond"), call.tensor("a"), call.tensor("b"))


@mil_op("reshape")
def _reshape(call: Call) -> Tensor:
    x = call.tensor("x")
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(call.integers("shape"))])


@mil_op("transpose")
def _transpose(call: Call) -> Tensor:
    return call.tensor("x").permute(call.integers("perm"))


@mil_op("squeeze")
def _squeeze(call: Call) -> Tensor:
    x = call.tensor("x")
    axes = call.integers("axes")
    return x.squeeze(tuple(axes)) if axes else x.squeeze()


@mil_op("expand_dims")
def _expand_dims(call: Call) -> Tensor:
    x, axes = call.tensor("x"), call.integers("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@mil_op("concat")
def _concat(call: Call) -> Tensor:
    values, axis = [torch.atleast_1d(part) for part in call.tensors("values")], _axis(call)
    if call.flag("interleave"):  # the first of each, the second of each …
        axis %= values[0].ndim
        return torch.stack(values, axis + 1).flatten(axis, axis + 1)
    return torch.cat(values, axis)


@mil_op("stack")
def _stack(call: Call) -> Tensor:
    return torch.stack(call.tensors("values"), _axis(call))


@mil_op("split")
def _split(call: Call) -> list[Tensor]:
    x, sizes = call.tensor("x"), call.integers("split_sizes")
    if not sizes:
        return list(torch.tensor_split(x, call.integer("num_splits"), _axis(call)))
    return list(torch.split(x, sizes, _axis(call)))


def _axis(call: Call) -> int:
    return call.integer("axis")


@mil_op("slice_by_index")
def _slice_by_index(call: Call) -> Tensor:
    x = call.tensor("x")
    begin, end = call.integers("begin"), call.integers("end")
    stride = call.integers("stride") or [1] * x.ndim
    no_begin, no_end, squeeze = (
        call.integers(f"{name}_mask") or [0] * x.ndim for name in ("begin", "end", "squeeze")
    )
    index: list[int | slice] = []
    for axis in range(x.ndim):
        if stride[axis] < 0:
            message = "slice_by_index with a negative stride is not known in torch"
            raise NotImplementedError(message)
        first = None if no_begin[axis] else begin[axis]
        if squeeze[axis]:
            index.append(first or 0)
        else:
            index.append(slice(first, None if no_end[axis] else end[axis], stride[axis]))
    return x[tuple(index)]


@mil_op("slice_by_size")
def _slice_by_size(call: Call) -> Tensor:
    x = call.tensor("x")
    for axis, (begin, size) in enumerate(
        zip(call.integers("begin"), call.integers("size"), strict=True)
    ):
        x = x.narrow(axis, begin, x.shape[axis] - begin if size == -1 else size)
    return x


@mil_op("tile")
def _tile(call: Call) -> Tensor:
    return call.tensor("x").repeat(call.integers("reps"))


@mil_op("shape")
def _shape(call: Call) -> Tensor:
    return torch.tensor(call.tensor("x").shape, dtype=torch.int32)


@mil_op("fill")
def _fill(call: Call) -> Tensor:
    return torch.full(call.integers("shape"), call.number("value"))


@mil_op("fill_like")
def _fill_like(call: Call) -> Tensor:
    value = call.number("value")
    return torch.full_like(call.tensor("ref_tensor"), value)


@mil_op("reduce_argmax")
def _reduce_argmax(call: Call) -> Tensor:
    keep = bool(call.integer("keep_dims", 0))
    return torch.argmax(call.tensor("x"), call.integer("axis", -1), keep).to(torch.int32)


@mil_op("topk")
def _topk(call: Call) -> list[Tensor]:
    ascending = bool(call.integer("ascending", 0))
    found = torch.topk(
        call.tensor("x"), call.integer("k", 1), call.integer("axis", -1), largest=not ascending
    )
    return [found.values, found.indices.to(torch.int32)]


@mil_op("range_1d")
def _range(call: Call) -> Tensor:
    return torch.arange(
        call.integer("start"), call.integer("end"), call.integer("step", 1), dtype=torch.int32
    )


@mil_op("pad")
def _pad(call: Call) -> Tensor:
    amounts = call.integers("pad")
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    flat = [amount for pair in reversed(pairs) for amount in pair]
    mode = call.text("mode", "constant")
    if mode == "constant":
        return F.pad(call.tensor("x"), flat, value=call.number("constant_val"))
    while flat and flat[-2:] == [0, 0]:  # torch pads the last axes only, in the other modes
        flat = flat[:-2]
    return F.pad(
        call.tensor("x"), flat, mode={"reflect": "reflect", "replicate": "replicate"}[mode]
    )


@mil_op("gather")
def _gather(call: Call) -> Tensor:
    x, indices = call.tensor("x"), call.tensor("indices").long()
    if call.integer("batch_dims"):
        message = "gather with batch_dims is not known in torch"
        raise NotImplementedError(message)
    axis = _axis(call) % x.ndim
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@mil_op("gather_along_axis")
def _gather_along_axis(call: Call) -> Tensor:
    x = call.tensor("x")
    axis = _axis(call) % x.ndim
    indices = call.tensor("indices").long()
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices))
