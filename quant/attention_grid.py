"""One grid for a value whose channels each have their own range, by folds around the attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.folds.attention import AttentionGroup, Operand, find_attention
from deploykit.quant.folds.candidates import repq_candidate
from deploykit.quant.folds.head_scale import fold_value_channels
from deploykit.quant.folds.layers import channel_axis
from deploykit.quant.histograms import merged
from deploykit.quant.observers import Histogram, Watch
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.ranges import RangeMethod, activation_range
from deploykit.types import PassRecord

__all__ = ["fold_values", "operand_rows", "producer_watch", "rewrite_operand", "value_watches"]


def value_watches(graph_module: fx.GraphModule, plans: Mapping[str, LayerPlan]) -> set[Watch]:
    """What has to be observed for ``fold_values``."""
    watches = set()
    for group in find_attention(graph_module):
        if _why_not(group, plans) is None:
            watches |= {producer_watch(group.value), _context(group)}
    return watches


def fold_values(
    graph_module: fx.GraphModule,
    plans: Mapping[str, LayerPlan],
    histograms: dict[Watch, Histogram],
    method: RangeMethod,
    activations: dict[tuple[str, int], FittedQuantizer],
) -> PassRecord:
    """Give every channel of a value the same range, in place, as RepQ does behind a norm.

    The value's grid goes to ``activations``. The attention's result is rewritten with it, so its
    histogram, that of the projection's input, is replaced in ``histograms``.
    """
    folded, declined = [], {}
    for group in find_attention(graph_module):
        reason = _why_not(group, plans)
        if reason is not None:
            declined[group.value.node.name] = reason
            continue
        bits = plans[group.context.name].input_bits
        rows = operand_rows(histograms, group.value)
        candidate = repq_candidate(activation_range(rows, bits, method, include_zero=False), bits)
        assert candidate.scale is not None and candidate.zero_point is not None
        shape = group.value.channels.shape
        ratio, shift = candidate.ratio.reshape(shape), candidate.shift.reshape(shape)
        fold_value_channels(graph_module, group, ratio, shift)
        rewrite_operand(histograms, group.value, ratio, shift)
        grid = UniformQuantizer(candidate.scale, candidate.zero_point, bits)
        activations[group.value.node.name, bits] = grid
        ours = group.columns >= 0
        context = _context(group)
        histograms[Watch(context.node)] = merged(
            histograms[context],
            torch.where(ours, candidate.ratio[group.columns], 1.0),
            torch.where(ours, candidate.shift[group.columns], 0.0),
        )
        folded.append(group.value.node.name)
    return PassRecord(
        name="fold_values",
        summary=f"{len(folded)} of {len(folded) + len(declined)} attention values folded",
        details={"declined": declined},
    )


def _why_not(group: AttentionGroup, plans: Mapping[str, LayerPlan]) -> str | None:
    value = group.value
    if value.declined is not None:
        return value.declined
    if value.shift_declined is not None:
        return value.shift_declined
    if value.shared or value.mixed.numel() or len(value.producers) != 1:
        return "its heads share channels, or several layers make it"
    if group.projection is None or group.projection.name not in plans:
        return "no quantised layer reads the attention's result"
    plan = plans.get(group.context.name)
    if plan is None or FLOAT in (plan.input_bits, plans[group.projection.name].input_bits):
        return "it is left in float"
    return None


def producer_watch(operand: Operand) -> Watch:
    """The channels of the one layer that makes an operand."""
    ((node, _),) = operand.producers
    return Watch(node.name, channel_axis(node))


def operand_rows(histograms: Mapping[Watch, Histogram], operand: Operand) -> Histogram:
    """Of an operand's channels, (H D) rows, from those of the one layer that makes it."""
    ((_, first),) = operand.producers
    made, channels = histograms[producer_watch(operand)], operand.channels.flatten() - first
    return Histogram(made.low[channels], made.high[channels], made.counts[channels])


def rewrite_operand(
    histograms: dict[Watch, Histogram], operand: Operand, ratio: Tensor, shift: Tensor
) -> None:
    """Let the histograms of the layer behind an operand tell of ``(x + shift) / ratio``, (H, D)."""
    ((node, first),) = operand.producers
    watch, channels = producer_watch(operand), operand.channels.flatten() - first
    made = histograms[watch]
    ratios, shifts = torch.ones_like(made.low), torch.zeros_like(made.low)
    ratios[channels], shifts[channels] = ratio.flatten().float(), shift.flatten().float()
    low, high = (made.low + shifts) / ratios, (made.high + shifts) / ratios
    histograms[watch] = Histogram(low, high, made.counts)
    if Watch(node.name) in histograms:
        histograms[Watch(node.name)] = merged(made, ratios, shifts)


def _context(group: AttentionGroup) -> Watch:
    assert group.projection is not None
    source = group.projection.args[0]
    assert isinstance(source, fx.Node)
    return Watch(source.name, channel_axis(group.projection))
