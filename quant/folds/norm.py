"""Rewrite a norm's output per channel, exactly in float: its readers take the change back.

The output ``x`` becomes ``(x + shift) / ratio`` through the norm's affine part, and each layer
that reads it multiplies its input columns by ``ratio`` and takes ``W shift`` off its bias. Which
ratio and shift are worth having is the candidates' matter (``candidates.py``, ``smooth.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deploykit.graph.edit import add_tensor, constant, is_op, layer_name
from deploykit.quant.folds.candidates import Center, NormCandidate, repq_candidate
from deploykit.quant.folds.layers import (
    CONV_OPS,
    absorb_input,
    channel_axis,
    column_absmax,
    input_channels,
    is_layer,
    takes_shift,
    weight_dtype,
    weight_of,
)
from deploykit.quant.folds.trace import BlockedError, Trace, keeps_shift, readers, table
from deploykit.quant.ranges import UniformRange

__all__ = [
    "NormCandidate",
    "NormGroup",
    "apply_norm_fold",
    "consumer_absmax",
    "find_norm_groups",
    "fold_norm",
    "repq_candidate",
]

aten = torch.ops.aten


@dataclass(frozen=True)
class NormGroup:
    """A LayerNorm or GroupNorm and the layers that read it.

    Attributes:
        norm: the norm's node.
        consumers: the layers that read its output, perhaps moved or averaged on the way.
        channel_axis: of the norm's output.
        declined: why it can't be folded, or None.
        columns: per consumer, the norm's channel at each of its input channels (I,); -1 where
            it reads something else.
        channels: C of the norm's output.
    """

    norm: fx.Node
    consumers: tuple[fx.Node, ...]
    channel_axis: int
    declined: str | None
    columns: tuple[Tensor, ...] = ()
    channels: int = 0

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """What each consumer reads: the norm itself, or the last of the moves between."""
        return tuple(layer.args[0] for layer in self.consumers)  # type: ignore[misc]


def find_norm_groups(
    graph_module: fx.GraphModule, *, through_moves: bool = False
) -> list[NormGroup]:
    """Every LayerNorm and GroupNorm, foldable or with the reason why not.

    Args:
        through_moves: follow the output through reshapes, window partitions, selected tokens
            and means over positions to the layers behind. What such a layer reads
            (``NormGroup.inputs``) is then another node than the norm, and takes the norm's new
            grid.
    """
    trace = Trace(graph_module)
    groups = []
    for node in graph_module.graph.nodes:
        if is_op(node, aten.layer_norm.default):
            axis = -1
        elif is_op(node, aten.group_norm.default):
            axis = 1
        else:
            continue
        found: list[tuple[fx.Node, Tensor]] = []
        reason = _shape_reason(graph_module, node)
        if reason is None:
            try:
                found = _consumers(trace, node, axis, through_moves)
            except BlockedError as blocked:
                reason = str(blocked)
        if reason is not None:
            groups.append(NormGroup(node, tuple(readers(node)), axis, reason))
        else:
            layers, columns = zip(*found, strict=True)
            channels = _channels(trace, node, axis)
            groups.append(NormGroup(node, layers, axis, None, columns, channels))
    return groups


def _shape_reason(graph_module: fx.GraphModule, norm: fx.Node) -> str | None:
    if is_op(norm, aten.layer_norm.default) and len(norm.args[1]) != 1:  # type: ignore[arg-type]
        return "it normalises more than the channels"
    for part in (*norm.args[2:4], norm.kwargs.get("weight"), norm.kwargs.get("bias")):
        if part is not None and (norm.kwargs or constant(graph_module, part) is None):
            return "its affine part is not constant"
    return None


def _channels(trace: Trace, norm: fx.Node, axis: int) -> int:
    if is_op(norm, aten.layer_norm.default):
        return int(norm.args[1][0])  # type: ignore[index, arg-type]
    weight = constant(trace.graph_module, norm.args[2]) if len(norm.args) > 2 else None
    return trace.shape(norm)[axis] if weight is None else len(weight)


def _consumers(
    trace: Trace, norm: fx.Node, axis: int, through_moves: bool
) -> list[tuple[fx.Node, Tensor]]:
    found = []
    users = readers(norm)
    for user in users:
        if not through_moves and not is_op(user, aten.linear.default, *CONV_OPS):
            raise BlockedError(f"{user.name} reads it and is no linear layer or convolution")
        if not user.args or (is_op(user, aten.linear.default, *CONV_OPS)
                             and user.args[0] is not norm):  # fmt: skip
            raise BlockedError(f"{user.name} reads it other than as a layer's input")
    if all(is_layer(trace.graph_module, user) for user in users):
        for user in users:
            if channel_axis(user) != axis:
                raise BlockedError(f"{user.name} reads its channels along another axis")
            found.append((user, torch.arange(input_channels(trace.graph_module, user))))
    else:
        shape = trace.shape(norm)
        labels = torch.arange(shape[axis], dtype=torch.int32)
        labels = labels.reshape(-1, *[1] * (len(shape) - 2)) if axis == 1 else labels
        for layer, at_input, path in trace.layers_after(norm, labels.expand(shape)):
            if not all(keeps_shift(node) for node in path):
                raise BlockedError("something between it and its readers is not linear")
            found.append((layer, table(at_input, [channel_axis(layer)]).long()))
    for layer, _ in found:
        if not takes_shift(layer):
            raise BlockedError(f"{layer.name} reads it and pads zeros, which a shift can't pass")
    if not found:
        raise BlockedError("nothing reads it")
    return found


def consumer_absmax(graph_module: fx.GraphModule, group: NormGroup) -> Tensor:
    """Largest absolute weight that reads each of the norm's channels, float64 (C,)."""
    result = torch.zeros(group.channels, dtype=torch.float64)
    for layer, columns in zip(group.consumers, group.columns, strict=True):
        absmax = column_absmax(layer, weight_of(graph_module, layer))
        ours = columns >= 0
        result.scatter_reduce_(0, columns[ours], absmax[ours], "amax")
    return result


def apply_norm_fold(
    graph_module: fx.GraphModule, group: NormGroup, ratio: Tensor, shift: Tensor
) -> None:
    """Let the norm give ``(x + shift) / ratio`` where it gave ``x``; the graph's result stays.

    ``gamma~ = gamma / ratio``, ``beta~ = (beta + shift) / ratio``; every consumer gets
    ``W~ = W diag(ratio)`` and ``b~ = b - W shift``. A norm without affine part is given one.

    Args:
        ratio: (C,), positive and finite.
        shift: (C,), finite.

    Raises:
        ValueError: the group is declined, or ``ratio`` or ``shift`` is unusable; nothing is
            changed then.
    """
    if group.declined is not None:
        raise ValueError(group.declined)
    ratio, shift = ratio.double(), shift.double()
    if len(ratio) != group.channels or len(shift) != group.channels:
        raise ValueError(f"{group.channels} ratios and shifts are wanted, not {len(ratio)}")
    if not bool(((ratio > 0) & torch.isfinite(ratio) & torch.isfinite(shift)).all()):
        raise ValueError("every ratio must be positive and finite, every shift finite")
    norm = group.norm
    weight, bias = (constant(graph_module, part) for part in [*norm.args[2:4], None, None][:2])
    gamma = torch.ones_like(ratio) if weight is None else weight.double()
    beta = torch.zeros_like(ratio) if bias is None else bias.double()
    kind = weight_dtype(graph_module, group.consumers[0])
    nodes = [
        add_tensor(graph_module, f"{layer_name(norm)}.folded_{part}", value.to(kind), norm)
        for part, value in (("weight", gamma / ratio), ("bias", (beta + shift) / ratio))
    ]
    norm.args = (*norm.args[:2], *nodes, *norm.args[4:])
    for layer, columns in zip(group.consumers, group.columns, strict=True):
        ours = columns >= 0
        absorb_input(
            graph_module,
            layer,
            torch.where(ours, ratio[columns], 1.0),
            torch.where(ours, shift[columns], 0.0),
            "folded",
        )
    graph_module.recompile()


def fold_norm(
    graph_module: fx.GraphModule,
    group: NormGroup,
    channels: UniformRange,
    bits: int,
    center: Center = "mean",
) -> tuple[float, int]:
    """Fold per-channel ranges of a norm's output into one (RepQ-ViT).

    Args:
        channels: per-channel scale and zero point (C,), as if quantised per channel.
        bits: width of the codes; bounds the common zero point.
        center: see ``repq_candidate``.

    Returns:
        The common scale and zero point, the norm's output's grid from now on.
    """
    candidate = repq_candidate(channels, bits, center)
    apply_norm_fold(graph_module, group, candidate.ratio, candidate.shift)
    assert candidate.scale is not None and candidate.zero_point is not None
    return candidate.scale, candidate.zero_point
