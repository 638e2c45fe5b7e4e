"""The table of ONNX operators: what each does to tensors, and to shapes.

A value is a tensor, or an array of numbers that only describe shapes: what ``Shape`` gives and
what is computed from that. Such an array holds Python integers, or torch's symbolic ones while a
free batch is being captured; operators on it run in numpy (``on_shapes``), so nothing of it
enters the captured graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from deploykit.onnx_import.graph import Array, Node

__all__ = [
    "OPERATORS",
    "Operator",
    "UnsupportedError",
    "apply",
    "fold",
    "integers",
    "on_shapes",
    "operator",
]

Value = Tensor | Array | None
Result = Any


class UnsupportedError(Exception):
    """What the reader doesn't know; the message is one line."""


@dataclass
class Operator:
    """One entry of the table.

    Attributes:
        on_tensors: ``(node, *inputs)`` to the output or a tuple of outputs.
        on_shapes: the same for arrays; None where shapes never pass through it.
        described: positions of inputs that describe (a shape, axes), and stay arrays.
    """

    on_tensors: Callable[..., Result] | None = None
    on_shapes: Callable[..., Result] | None = None
    described: tuple[int, ...] = ()


OPERATORS: dict[str, Operator] = {}
_F = TypeVar("_F", bound=Callable[..., Result])


def operator(*names: str, described: Iterable[int] = ()) -> Callable[[_F], _F]:
    """Decorator: how the operators called ``names`` work on tensors."""

    def register(function: _F) -> _F:
        for name in names:
            entry = OPERATORS.setdefault(name, Operator())
            entry.on_tensors, entry.described = function, tuple(described)
        return function

    return register


def on_shapes(*names: str) -> Callable[[_F], _F]:
    """Decorator: how the operators called ``names`` work on arrays of sizes."""

    def register(function: _F) -> _F:
        for name in names:
            OPERATORS.setdefault(name, Operator()).on_shapes = function
        return function

    return register


def apply(node: Node, inputs: list[Value]) -> tuple[Value, ...]:
    """The node's outputs.

    Raises:
        UnsupportedError: the operator, or this use of it, is not known.
    """
    entry = OPERATORS.get(node.op)
    if entry is None:
        raise UnsupportedError(f"operator {node.op} is not read")
    data = [v for at, v in enumerate(inputs) if at not in entry.described]
    arrays = not any(isinstance(value, Tensor) for value in data)
    if arrays and data and entry.on_shapes is not None:
        made = entry.on_shapes(node, *inputs)
    elif entry.on_tensors is None:
        raise UnsupportedError(f"operator {node.op} is read for shapes only")
    else:
        placed = [v if at in entry.described else _tensor(v) for at, v in enumerate(inputs)]
        made = entry.on_tensors(node, *placed)
    return tuple(made) if isinstance(made, (tuple, list)) else (made,)


def fold(node: Node, inputs: list[Array | None]) -> list[Array]:
    """The outputs of a node whose inputs are all constants.

    Raises:
        UnsupportedError: the operator, or this use of it, is not known.
    """
    entry = OPERATORS.get(node.op)
    if entry is None:
        raise UnsupportedError(f"operator {node.op} is not read")
    if entry.on_shapes is not None:
        made = entry.on_shapes(node, *inputs)
    elif entry.on_tensors is not None:
        placed = [
            value if at in entry.described or value is None else _whole(value)
            for at, value in enumerate(inputs)
        ]
        made = entry.on_tensors(node, *placed)
    results = made if isinstance(made, (tuple, list)) else (made,)
    return [value.numpy() if isinstance(value, Tensor) else value for value in results]


def _whole(value: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))


def _tensor(value: Value) -> Any:
    """An array among tensors: a Python number where it is one, for that needs no constant."""
    if not isinstance(value, np.ndarray):
        return value
    if value.size == 1:
        return value.reshape(()).item()
    if value.dtype == object:
        raise UnsupportedError("a size that depends on the batch is used as data")
    return _whole(value)


def integers(value: Value, what: str) -> list[Any]:
    """An array of sizes as a list; its elements may be symbolic.

    Raises:
        UnsupportedError: it was computed from the image.
    """
    if value is None:
        raise UnsupportedError(f"{what} is missing")
    if isinstance(value, Tensor):
        raise UnsupportedError(f"{what} depends on the image")
    return [int(v) if isinstance(v, (int, np.integer)) else v for v in value.reshape(-1)]
