"""A layer's inputs and outputs as rows: linear layers and convolutions as matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from deploykit.graph.edit import is_op

__all__ = ["LayerShape", "input_rows", "output_rows"]

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


def input_rows(node: fx.Node, args: Any, shape: LayerShape) -> Tensor:
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


def output_rows(node: fx.Node, y: Tensor, shape: LayerShape) -> Tensor:
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
