"""Fold BatchNorm into the convolution or linear layer beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deploykit.graph.edit import add_tensor, clean, constant, is_op, layer_name
from deploykit.quant.folds.layers import CONV_OPS, freeze_parameters

__all__ = ["FoldReport", "fold_batch_norm"]

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)
_LIKE = (aten.reshape_as.default, aten.view_as.default, aten.expand_as.default)


@dataclass(frozen=True)
class FoldReport:
    """How many norms went, and why the others stay."""

    folded: int
    kept: dict[str, str]


def fold_batch_norm(graph_module: fx.GraphModule) -> FoldReport:
    """Fold every inference BatchNorm that has a convolution or linear layer beside it, in place.

    A norm is folded backwards into the layer that feeds it (also through a reshape that keeps
    the channels last, as in LeViT), else forwards into a linear layer or unpadded 1x1
    convolution that is its only consumer. Exact up to float rounding.

    Returns:
        The number of norms folded and a reason for each that stays.
    """
    freeze_parameters(graph_module)
    folded, kept = 0, {}
    for node in list(graph_module.graph.nodes):
        if not is_op(node, aten.batch_norm.default):
            continue
        affine = _affine(graph_module, node)
        if affine is None:
            kept[layer_name(node)] = "its statistics are not constants"
        elif _fold_backward(graph_module, node, *affine) or _fold_forward(
            graph_module, node, *affine
        ):
            folded += 1
        else:
            kept[layer_name(node)] = "no convolution or linear layer beside it alone"
    clean(graph_module)
    return FoldReport(folded, kept)


def _affine(graph_module: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """The norm as ``scale * x + shift``, float64, each (C,)."""
    weight, bias, mean, var = (constant(graph_module, arg) for arg in node.args[1:5])
    if mean is None or var is None or node.args[5]:
        return None
    eps = float(node.args[7])  # type: ignore[arg-type]
    scale = torch.rsqrt(var.double() + eps)
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale, shift


def _replace_layer(
    graph_module: fx.GraphModule,
    layer: fx.Node,
    change: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
) -> bool:
    """Give ``layer`` a new weight and bias computed from the old in float64."""
    weight = constant(graph_module, layer.args[1])
    old_bias = layer.args[2] if len(layer.args) > 2 else None
    bias = constant(graph_module, old_bias)
    if weight is None or (old_bias is not None and bias is None):
        return False
    new_weight, new_bias = change(weight.double(), None if bias is None else bias.double())
    stem = layer_name(layer)
    nodes = [
        add_tensor(graph_module, f"{stem}.{part}", value.to(weight.dtype), layer)
        for part, value in (("folded_weight", new_weight), ("folded_bias", new_bias))
    ]
    layer.args = (layer.args[0], *nodes, *layer.args[3:])
    return True


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users that read a node's values, not only its shape."""
    return [
        user
        for user in node.users
        if not is_op(user, aten.sym_size.int)
        and not (is_op(user, *_LIKE) and user.args[0] is not node)
    ]


def _fold_backward(
    graph_module: fx.GraphModule, norm: fx.Node, scale: Tensor, shift: Tensor
) -> bool:
    source = norm.args[0]
    assert isinstance(source, fx.Node)
    layer = source
    if is_op(source, *_RESHAPES) and len(_readers(source)) == 1:
        before = source.args[0]
        # Only a reshape that keeps the channels last, (…, C) to (M, C), commutes with the norm.
        value = source.meta.get("val")
        if is_op(before, aten.linear.default) and value is not None and value.ndim == 2:
            assert isinstance(before, fx.Node)
            before_value = before.meta.get("val")
            if before_value is not None and before_value.shape[-1] == value.shape[-1]:
                layer = before
    is_linear = is_op(layer, aten.linear.default)
    if not (is_linear or is_op(layer, *CONV_OPS)) or len(_readers(layer)) != 1:
        return False
    if is_linear and layer is source:
        value = layer.meta.get("val")
        if value is None or value.ndim != 2:  # (N, L, C): the norm would act on L
            return False

    def change(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        per_output = scale.reshape(-1, *[1] * (weight.ndim - 1))
        return weight * per_output, shift if bias is None else bias * scale + shift

    if not _replace_layer(graph_module, layer, change):
        return False
    norm.replace_all_uses_with(source)
    graph_module.graph.erase_node(norm)
    return True


def _fold_forward(
    graph_module: fx.GraphModule, norm: fx.Node, scale: Tensor, shift: Tensor
) -> bool:
    users = list(norm.users)
    if len(users) != 1 or users[0].args[0] is not norm:
        return False
    layer = users[0]
    if is_op(layer, aten.conv2d.default):
        weight = constant(graph_module, layer.args[1])
        padding = layer.args[4] if len(layer.args) > 4 else [0, 0]
        groups = layer.args[6] if len(layer.args) > 6 else 1
        # A padded zero is put in after the norm, so a shift can't pass a padded convolution.
        if weight is None or weight.shape[2:] != (1, 1) or any(padding) or groups != 1:  # type: ignore[arg-type]
            return False
    elif is_op(layer, aten.linear.default):
        value = norm.meta.get("val")
        if value is None or value.ndim != 2:
            return False
    else:
        return False

    def change(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = weight.flatten(1)
        new_bias = flat @ shift if bias is None else flat @ shift + bias
        return (flat * scale).reshape(weight.shape), new_bias

    if not _replace_layer(graph_module, layer, change):
        return False
    norm.replace_all_uses_with(norm.args[0])  # type: ignore[arg-type]
    graph_module.graph.erase_node(norm)
    return True
