"""Second moments of a layer's input and error: all that closed-form rounding needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deploykit.graph.edit import is_op

__all__ = ["LayerMoments", "LayerShape", "Moments"]

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerShape:
    """A linear layer or convolution as ``groups`` matrix products.

    Attributes:
        groups: G.
        inputs: K, what one output of a group reads (channels times kernel positions).
        outputs: O, outputs of a group.
    """

    groups: int
    inputs: int
    outputs: int

    @classmethod
    def of(cls, node: fx.Node, weight: Tensor) -> LayerShape:
        groups = 1 if is_op(node, aten.linear.default) else int(_option(node, 6, 1))
        return cls(groups, weight[0].numel(), len(weight) // groups)

    def matrices(self, weight: Tensor) -> Tensor:
        """A weight (out, …) as (G, O, K)."""
        return weight.reshape(self.groups, self.outputs, self.inputs)


class Moments:
    """Means and covariances of a layer's inputs and of its output error, batch by batch.

    Memory is ``G K (K + O)`` floats whatever the number of images.

    Attributes:
        rows: how many input vectors were seen.
    """

    def __init__(self, shape: LayerShape) -> None:
        g, k, o = shape.groups, shape.inputs, shape.outputs
        self.shape = shape
        self.rows = 0
        self._xx = torch.zeros(g, k, k)
        self._xe = torch.zeros(g, k, o)
        self._x = torch.zeros(g, k, dtype=torch.float64)
        self._e = torch.zeros(g, o, dtype=torch.float64)

    def update(self, x: Tensor, e: Tensor) -> None:
        """Add rows: inputs (G, rows, K) and the output errors (G, rows, O) they come with."""
        self.rows += x.shape[1]
        self._xx += x.transpose(1, 2) @ x
        self._xe += x.transpose(1, 2) @ e
        self._x += x.sum(1, dtype=torch.float64)
        self._e += e.sum(1, dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.shape)
        both.rows = self.rows + other.rows
        for part in ("_xx", "_xe", "_x", "_e"):
            setattr(both, part, getattr(self, part) + getattr(other, part))
        return both

    @property
    def input_mean(self) -> Tensor:
        """(G, K), float32."""
        return (self._x / self.rows).float()

    @property
    def error_mean(self) -> Tensor:
        """(G, O), float32."""
        return (self._e / self.rows).float()

    def covariance(self) -> Tensor:
        """Of the input, (G, K, K)."""
        mean = self.input_mean
        return self._xx / self.rows - mean[:, :, None] * mean[:, None, :]

    def cross_covariance(self) -> Tensor:
        """Of the input with the output error, (G, K, O)."""
        return self._xe / self.rows - self.input_mean[:, :, None] * self.error_mean[:, None, :]


class LayerMoments:
    """A layer's moments in two halves, so that what one half suggests can be tried on the other.

    Each batch is split in the middle, between images.
    """

    def __init__(self, shape: LayerShape) -> None:
        self.halves = (Moments(shape), Moments(shape))

    def update(self, node: fx.Node, args: Any, error: Tensor) -> None:
        """Add a batch.

        Args:
            args: the layer's evaluated arguments; the first is its (quantised) input.
            error: what its output should be, less what it is with ``args``.
        """
        x, e = _input_rows(node, args, self.shape), _output_rows(node, error, self.shape)
        middle = x.shape[1] // 2
        for half, part in zip(self.halves, (slice(middle), slice(middle, None)), strict=True):
            half.update(x[:, part], e[:, part])

    @property
    def shape(self) -> LayerShape:
        return self.halves[0].shape

    def both(self) -> Moments:
        """Of all rows."""
        return self.halves[0] + self.halves[1]


def _input_rows(node: fx.Node, args: Any, shape: LayerShape) -> Tensor:
    """Input vectors as (G, rows, K)."""
    x: Tensor = args[0]
    if is_op(node, aten.linear.default):
        return x.reshape(1, -1, shape.inputs)
    stride, padding, dilation = (
        _option_of(args, 3, [1, 1]),
        _option_of(args, 4, [0, 0]),
        _option_of(args, 5, [1, 1]),
    )
    kernel = args[1].shape[2:]
    if isinstance(padding, str):
        padding = _named_padding(padding, kernel, dilation)
        x = F.pad(x, padding)
        padding = [0, 0]
    if tuple(kernel) == (1, 1) and list(stride) == [1, 1] and not any(padding):
        columns = x.flatten(2)
    else:
        columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    columns = columns.reshape(len(x), shape.groups, shape.inputs, -1)
    return columns.permute(1, 0, 3, 2).reshape(shape.groups, -1, shape.inputs)


def _output_rows(node: fx.Node, y: Tensor, shape: LayerShape) -> Tensor:
    """Output vectors as (G, rows, O)."""
    if is_op(node, aten.linear.default):
        return y.reshape(1, -1, shape.outputs)
    columns = y.reshape(len(y), shape.groups, shape.outputs, -1)
    return columns.permute(1, 0, 3, 2).reshape(shape.groups, -1, shape.outputs)


def _named_padding(padding: str, kernel: Any, dilation: Any) -> list[int]:
    """Padding of torch's ``same`` (odd remainders go after) for ``F.pad``: left, right, top …"""
    if padding == "valid":
        return [0, 0, 0, 0]
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    (top, left) = (t // 2 for t in totals)
    return [left, totals[1] - left, top, totals[0] - top]


def _option(node: fx.Node, position: int, default: Any) -> Any:
    return _option_of(node.args, position, default)


def _option_of(args: Any, position: int, default: Any) -> Any:
    value = args[position] if len(args) > position else default
    return [value] * 2 if isinstance(value, int) and isinstance(default, list) else value
