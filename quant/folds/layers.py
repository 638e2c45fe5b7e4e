"""Layers with constant weights, and how they take scales and shifts of their channels.

All arithmetic is in float64 and stored in the old tensor's type. New tensors are always made, so
weights shared between layers are never changed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from deploykit.graph.edit import add_tensor, constant, is_op, layer_name

__all__ = [
    "CONV_OPS",
    "absorb_input",
    "bias_of",
    "channel_axis",
    "column_absmax",
    "columns",
    "freeze_parameters",
    "input_channels",
    "is_affine_norm",
    "is_layer",
    "op_name",
    "replace_parameters",
    "row_absmax",
    "scale_output",
    "takes_shift",
    "weight_dtype",
    "weight_of",
]

aten = torch.ops.aten

CONV_OPS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
)


def op_name(node: fx.Node) -> str:
    """``relu`` for a call of ``aten.relu.default``; for messages."""
    name = str(getattr(node.target, "__name__", node.target)) if node.op != "output" else "output"
    return name.split(".")[0].strip("_")


def is_layer(graph_module: fx.GraphModule, node: object) -> bool:
    """Whether a node is a linear layer or convolution with constant weight and bias."""
    if not (isinstance(node, fx.Node) and is_op(node, aten.linear.default, *CONV_OPS)):
        return False
    bias = node.args[2] if len(node.args) > 2 else None
    return (
        not node.kwargs
        and constant(graph_module, node.args[1]) is not None
        and (bias is None or constant(graph_module, bias) is not None)
    )


def is_affine_norm(graph_module: fx.GraphModule, node: object) -> bool:
    """Whether a node is a LayerNorm over the last axis alone with constant weight and bias."""
    if not (isinstance(node, fx.Node) and is_op(node, aten.layer_norm.default)):
        return False
    parts = [*node.args[2:4], None, None][:2]
    return (
        not node.kwargs
        and len(node.args[1]) == 1  # type: ignore[arg-type]
        and constant(graph_module, parts[0]) is not None
        and (parts[1] is None or constant(graph_module, parts[1]) is not None)
    )


def freeze_parameters(graph_module: fx.GraphModule) -> int:
    """Compute weights and biases that are made from constants alone, once, in place.

    Such are the biases that BEiT and EVA join from three, and standardised weights.

    Returns:
        How many were computed.
    """
    count = 0
    for node in list(graph_module.graph.nodes):
        if not is_op(node, aten.linear.default, *CONV_OPS):
            continue
        for at in range(1, min(3, len(node.args))):
            part = node.args[at]
            if isinstance(part, fx.Node) and part.op != "get_attr":
                value = _evaluate(graph_module, part)
                if isinstance(value, Tensor):
                    name = f"{layer_name(node)}.{('weight', 'bias')[at - 1]}"
                    frozen = add_tensor(graph_module, name, value, node)
                    node.args = (*node.args[:at], frozen, *node.args[at + 1 :])
                    count += 1
    return count


def _evaluate(graph_module: fx.GraphModule, node: fx.Node) -> Any:
    """The value of a node made from constants alone, or None."""
    if node.op == "get_attr":
        return constant(graph_module, node)
    if node.op != "call_function" or not node.all_input_nodes or not callable(node.target):
        return None
    values: dict[fx.Node, Any] = {
        source: _evaluate(graph_module, source) for source in node.all_input_nodes
    }
    if any(value is None for value in values.values()):
        return None
    arguments = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
    with torch.no_grad():
        return node.target(*arguments[0], **arguments[1])


def weight_of(graph_module: fx.GraphModule, layer: fx.Node) -> Tensor:
    """Weight of a layer (out, in / groups, …) or of an affine LayerNorm (C,), float64."""
    return _weight(graph_module, layer).double()


def weight_dtype(graph_module: fx.GraphModule, layer: fx.Node) -> torch.dtype:
    """Type of the weight of a layer or affine LayerNorm."""
    return _weight(graph_module, layer).dtype


def _weight(graph_module: fx.GraphModule, layer: fx.Node) -> Tensor:
    weight = constant(graph_module, layer.args[2 if is_op(layer, aten.layer_norm.default) else 1])
    assert weight is not None
    return weight


def bias_of(graph_module: fx.GraphModule, layer: fx.Node) -> Tensor | None:
    """Bias of a layer (out,) or of an affine LayerNorm (C,), float64, or None."""
    at = 3 if is_op(layer, aten.layer_norm.default) else 2
    bias = constant(graph_module, layer.args[at]) if len(layer.args) > at else None
    return None if bias is None else bias.double()


def channel_axis(layer: fx.Node) -> int:
    """Axis of the channels in the layer's input and output of (N, C, …) or (…, C)."""
    return 1 if is_op(layer, *CONV_OPS) else -1


def groups_of(layer: fx.Node) -> int:
    groups = layer.args[6] if is_op(layer, *CONV_OPS) and len(layer.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def input_channels(graph_module: fx.GraphModule, layer: fx.Node) -> int:
    """How many channels the layer reads."""
    return int(weight_of(graph_module, layer).shape[1]) * groups_of(layer)


def takes_shift(layer: fx.Node) -> bool:
    """Whether a constant per input channel can go to the bias: nowhere a zero is padded in."""
    padding = layer.args[4] if is_op(layer, *CONV_OPS) and len(layer.args) > 4 else [0]
    if isinstance(padding, str):
        return padding == "valid"
    return not any(padding)  # type: ignore[arg-type]


def columns(layer: fx.Node, weight: Tensor, values: Tensor) -> Tensor:
    """One value per input channel (I,), laid out to multiply ``weight`` (O, I / groups, …)."""
    groups, out = groups_of(layer), len(weight)
    per_row = values.reshape(groups, 1, -1).expand(groups, out // groups, -1).reshape(out, -1)
    return per_row.reshape(*per_row.shape, *[1] * (weight.ndim - 2))


def row_absmax(weight: Tensor) -> Tensor:
    """Largest absolute weight of every output channel, (O,)."""
    return weight.abs().flatten(1).amax(1)


def column_absmax(layer: fx.Node, weight: Tensor) -> Tensor:
    """Largest absolute weight of every input channel, (I,)."""
    per_row = weight.abs().reshape(*weight.shape[:2], -1).amax(2)
    return per_row.reshape(groups_of(layer), -1, weight.shape[1]).amax(1).flatten()


def absorb_input(
    graph_module: fx.GraphModule, layer: fx.Node, ratio: Tensor, shift: Tensor | None, name: str
) -> None:
    """Let ``layer`` read ``(x + shift) / ratio`` where it read ``x``, its output unchanged.

    ``W~ = W diag(ratio)`` and ``b~ = b - W shift``.

    Args:
        ratio, shift: (I,), one per input channel. ``shift`` needs ``takes_shift(layer)``.
        name: goes into the new tensors' names.
    """
    weight, bias = weight_of(graph_module, layer), bias_of(graph_module, layer)
    if shift is not None:
        moved = (weight * columns(layer, weight, shift)).flatten(1).sum(1)
        bias = -moved if bias is None else bias - moved
    weight = weight * columns(layer, weight, ratio)
    replace_parameters(graph_module, layer, weight, bias, name)


def scale_output(
    graph_module: fx.GraphModule, layer: fx.Node, ratio: Tensor, shift: Tensor | None, name: str
) -> None:
    """Let a layer or affine LayerNorm give ``(y + shift) / ratio`` where it gave ``y``.

    Args:
        ratio, shift: (O,), one per output channel.
        name: goes into the new tensors' names.
    """
    weight, bias = weight_of(graph_module, layer), bias_of(graph_module, layer)
    weight = weight / ratio.reshape(-1, *[1] * (weight.ndim - 1))
    if shift is not None:
        bias = shift if bias is None else bias + shift
    replace_parameters(graph_module, layer, weight, None if bias is None else bias / ratio, name)


def replace_parameters(
    graph_module: fx.GraphModule, layer: fx.Node, weight: Tensor, bias: Tensor | None, name: str
) -> None:
    """Give a layer or affine LayerNorm new tensors, in the type of its old weight."""
    at = 2 if is_op(layer, aten.layer_norm.default) else 1
    old = _weight(graph_module, layer)
    stem = f"{layer_name(layer)}.{name}"
    new: list[fx.Node | None] = [
        None if value is None else add_tensor(graph_module, f"{stem}_{part}", value.to(old), layer)
        for part, value in (("weight", weight), ("bias", bias))
    ]
    layer.args = (*layer.args[:at], *new, *layer.args[at + 2 :])
