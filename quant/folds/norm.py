"""RepQ's fold: per-channel scales of a norm's output become one, exactly in float.

A norm's output feeding linear layers is quantised per channel for free: the norm's affine part
and the layers' input columns absorb the difference between each channel's scale and one common
scale (RepQ-ViT, arXiv 2212.08254, eq. 6 to 9).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deploykit.graph.edit import add_tensor, constant, is_op, layer_name
from deploykit.quant.ranges import UniformRange

__all__ = ["NormGroup", "find_norm_groups", "fold_norm"]

aten = torch.ops.aten


@dataclass(frozen=True)
class NormGroup:
    """A LayerNorm or GroupNorm and the layers that read it.

    Attributes:
        norm: the norm's node.
        consumers: all users of its output, each a linear layer or a 1x1 convolution.
        channel_axis: of the norm's output.
        declined: why it can't be folded, or None.
    """

    norm: fx.Node
    consumers: tuple[fx.Node, ...]
    channel_axis: int
    declined: str | None


def find_norm_groups(graph_module: fx.GraphModule) -> list[NormGroup]:
    """Every LayerNorm and GroupNorm with an affine part, foldable or with the reason why not."""
    groups = []
    for node in graph_module.graph.nodes:
        if is_op(node, aten.layer_norm.default):
            axis, weight_at = -1, 2
        elif is_op(node, aten.group_norm.default):
            axis, weight_at = 1, 2
        else:
            continue
        consumers = tuple(node.users)
        groups.append(NormGroup(node, consumers, axis, _reason(graph_module, node, weight_at)))
    return groups


def _reason(graph_module: fx.GraphModule, norm: fx.Node, weight_at: int) -> str | None:
    if len(norm.args) <= weight_at or constant(graph_module, norm.args[weight_at]) is None:
        return "it has no affine part"
    if is_op(norm, aten.layer_norm.default) and len(norm.args[1]) != 1:  # type: ignore[arg-type]
        return "it normalises more than the channels"
    for user in norm.users:
        if not user.args or user.args[0] is not norm:
            return f"{user.name} reads it other than as a layer's input"
        weight = constant(graph_module, user.args[1]) if len(user.args) > 1 else None
        if is_op(norm, aten.layer_norm.default):
            if not is_op(user, aten.linear.default) or weight is None:
                return f"{user.name} reads it and is no linear layer"
        else:
            if not is_op(user, aten.conv2d.default) or weight is None:
                return f"{user.name} reads it and is no convolution"
            padding = user.args[4] if len(user.args) > 4 else [0, 0]
            groups = user.args[6] if len(user.args) > 6 else 1
            if weight.shape[2:] != (1, 1) or any(padding) or groups != 1:  # type: ignore[arg-type]
                return f"{user.name} reads it and is no plain 1x1 convolution"
    return None


def fold_norm(
    graph_module: fx.GraphModule, group: NormGroup, channels: UniformRange, bits: int
) -> tuple[float, int]:
    """Fold per-channel ranges of a norm's output into its affine part and its consumers.

    With ``r1 = s / s~`` and ``r2 = z - z~``: ``gamma~ = gamma / r1``,
    ``beta~ = (beta + s r2) / r1``, ``W~ = W diag(r1)``, ``b~ = b - W (s r2)``.

    Args:
        channels: per-channel scale and zero point (C,), as if quantised per channel.
        bits: width of the codes; bounds the common zero point.

    Returns:
        The common scale (mean of ``s``) and zero point (rounded mean of ``z``: RepQ's own code
        leaves it fractional, which gives ``2**bits + 1`` codes).
    """
    if group.declined is not None:
        raise ValueError(group.declined)
    scale, zero_point = channels.scale.double(), channels.zero_point.double()
    common = float(scale.mean().float())
    common_zero = int(zero_point.mean().round().clamp(0, 2**bits - 1))
    ratio = scale / common
    shift = scale * (zero_point - common_zero)

    norm = group.norm
    gamma = constant(graph_module, norm.args[2])
    beta = constant(graph_module, norm.args[3]) if len(norm.args) > 3 else None
    assert gamma is not None
    new_beta = ((0 if beta is None else beta.double()) + shift) / ratio
    stem = layer_name(norm)
    norm.args = (
        *norm.args[:2],
        add_tensor(graph_module, f"{stem}.repq_weight", _like(gamma.double() / ratio, gamma), norm),
        add_tensor(graph_module, f"{stem}.repq_bias", _like(new_beta, gamma), norm),
        *norm.args[4:],
    )
    for layer in group.consumers:
        _absorb(graph_module, layer, ratio, shift)
    return common, common_zero


def _absorb(graph_module: fx.GraphModule, layer: fx.Node, ratio: Tensor, shift: Tensor) -> None:
    weight = constant(graph_module, layer.args[1])
    assert weight is not None
    bias = constant(graph_module, layer.args[2]) if len(layer.args) > 2 else None
    flat = weight.double().flatten(1)
    new_bias = -(flat @ shift) if bias is None else bias.double() - flat @ shift
    new_weight = (flat * ratio).reshape(weight.shape)
    stem = layer_name(layer)
    layer.args = (
        layer.args[0],
        add_tensor(graph_module, f"{stem}.repq_weight", _like(new_weight, weight), layer),
        add_tensor(graph_module, f"{stem}.repq_bias", _like(new_bias, weight), layer),
        *layer.args[3:],
    )


def _like(value: Tensor, reference: Tensor) -> Tensor:
    return value.to(reference.dtype)
