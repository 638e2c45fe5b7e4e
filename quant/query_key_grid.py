"""One grid for all heads' queries, and one for their keys, by rewrites the softmax doesn't see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.attention_grid import operand_rows, producer_watch, rewrite_operand
from deploykit.quant.folds.attention import AttentionGroup, Operand, find_attention
from deploykit.quant.folds.head_scale import balance_query_key, fold_head_scales, fold_query_key
from deploykit.quant.histograms import merged
from deploykit.quant.observers import Histogram, Watch
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.ranges import RangeMethod, activation_range
from deploykit.types import PassRecord

__all__ = ["fold_query_keys", "query_key_axes", "query_key_watches"]

WORTH = 0.7  # of the error may be left by what needs a multiplication of the logits


@dataclass(frozen=True)
class _Rewrite:
    """Queries ``q factor / query_scale`` and keys ``(k + shift) / (factor key_scale)``.

    Attributes:
        factor, shift: (H, D).
        query_scale, key_scale: (H,), None where heads keep theirs.
    """

    name: str
    factor: Tensor
    shift: Tensor
    query_scale: Tensor | None = None
    key_scale: Tensor | None = None

    @property
    def query_ratio(self) -> Tensor:
        return _relative(self.query_scale) / self.factor

    @property
    def key_ratio(self) -> Tensor:
        return _relative(self.key_scale) * self.factor


def query_key_watches(graph_module: fx.GraphModule, plans: Mapping[str, LayerPlan]) -> set[Watch]:
    """What has to be observed for ``fold_query_keys``."""
    return {producer_watch(part) for part in _operands(graph_module, plans)}


def query_key_axes(graph_module: fx.GraphModule, plans: Mapping[str, LayerPlan]) -> dict[str, int]:
    """The layers that ``fold_query_keys`` wants samples of, with their channel axes."""
    watches = query_key_watches(graph_module, plans)
    return {watch.node: watch.channel_axis for watch in watches if watch.channel_axis is not None}


def fold_query_keys(
    graph_module: fx.GraphModule,
    plans: Mapping[str, LayerPlan],
    histograms: dict[Watch, Histogram],
    samples: Mapping[str, Tensor],
    method: RangeMethod,
    activations: dict[tuple[str, int], FittedQuantizer],
) -> PassRecord:
    """Rewrite queries and keys so that one grid each loses least, in place.

    Per channel, the wider of query and key gives range to the other; keys lose their mean, which
    the softmax doesn't see; every head may get its own scale, made up for by a multiplication of
    the logits, where that is worth it. What is done is what measures best on the logits of
    sampled tokens. The grids go to ``activations``.

    Args:
        samples: rows of the layers in ``query_key_axes``, channels last.
    """
    counts: dict[str, int] = {}
    declined = {}
    details = {}
    for group in find_attention(graph_module):
        reason = _why_not(group, plans)
        if reason is not None:
            declined[group.logits.name] = reason
            continue
        bits = plans[group.logits.name].input_bits
        q, k = operand_rows(histograms, group.query), operand_rows(histograms, group.key)
        some_q, some_k = _sampled(samples, group.query), _sampled(samples, group.key)
        best: tuple[float, _Rewrite, UniformQuantizer, UniformQuantizer] | None = None
        errors = {}
        for rewrite in _rewrites(group, q, k, bits, method):
            zero = torch.zeros_like(rewrite.shift)
            grids = (
                _grid(q, rewrite.query_ratio, zero, bits, method),
                _grid(k, rewrite.key_ratio, rewrite.shift, bits, method),
            )
            error = _logits_error(some_q, some_k, rewrite, *grids)
            errors[rewrite.name] = float(f"{error:.3g}")
            worth = 1.0 if rewrite.query_scale is None else WORTH
            if best is None or error < worth * best[0]:
                best = (error, rewrite, *grids)
        assert best is not None
        _, rewrite, query_grid, key_grid = best
        _apply(graph_module, group, rewrite, histograms)
        activations[group.query.node.name, bits] = query_grid
        activations[group.key.node.name, bits] = key_grid
        counts[rewrite.name] = counts.get(rewrite.name, 0) + 1
        details[group.logits.name] = errors
    chosen = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return PassRecord(
        name="fold_query_keys",
        summary=f"{len(details)} of {len(details) + len(declined)} attentions' queries and keys "
        "fitted" + (f" ({chosen})" if chosen else ""),
        details={"declined": declined, "relative_error": details},
    )


def _operands(graph_module: fx.GraphModule, plans: Mapping[str, LayerPlan]) -> Iterable[Operand]:
    for group in find_attention(graph_module):
        if _why_not(group, plans) is None:
            yield from (group.query, group.key)


def _why_not(group: AttentionGroup, plans: Mapping[str, LayerPlan]) -> str | None:
    plan = plans.get(group.logits.name)
    if plan is None or plan.input_bits == FLOAT:
        return "it is left in float"
    for part in (group.query, group.key):
        if part.declined is not None:
            return part.declined
        if part.shared or part.mixed.numel() or len(part.producers) != 1:
            return "its heads share channels, or several layers make it"
    if group.query.shift_declined is not None:
        return group.query.shift_declined
    return None


def _rewrites(
    group: AttentionGroup, q: Histogram, k: Histogram, bits: int, method: RangeMethod
) -> list[_Rewrite]:
    shape = group.query.channels.shape
    (q_low, q_high), (k_low, k_high) = (_bounds(rows, bits, method, shape) for rows in (q, k))
    one, zero = torch.ones_like(k_low), torch.zeros_like(k_low)
    shift = zero if group.key.shift_declined is not None else -(k_low + k_high) / 2
    q_most = torch.maximum(q_low.abs(), q_high.abs())
    k_most = torch.maximum((k_low + shift).abs(), (k_high + shift).abs())
    balance = balance_query_key(q_most, k_most)
    found = [_Rewrite("off", one, zero), _Rewrite("shift", one, shift)]
    found.append(_Rewrite("balance", balance, shift))
    scales = ((q_most * balance).amax(1), (k_most / balance).amax(1))
    if all(bool((scale > 0).all()) for scale in scales):
        found.append(_Rewrite("balance and heads", balance, shift, *scales))
    return found


def _bounds(
    rows: Histogram, bits: int, method: RangeMethod, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """The range of every channel, (H, D) float64, tails cut as the method does."""
    ranges = activation_range(rows, bits, method, include_zero=False)
    low = -ranges.scale.double() * ranges.zero_point.double()
    high = low + ranges.scale.double() * (2**bits - 1)
    return low.reshape(shape), high.reshape(shape)


def _grid(
    rows: Histogram, ratio: Tensor, shift: Tensor, bits: int, method: RangeMethod
) -> UniformQuantizer:
    found = activation_range(merged(rows, ratio.flatten(), shift.flatten()), bits, method)
    return UniformQuantizer(float(found.scale[0]), int(found.zero_point[0]), bits)


def _sampled(samples: Mapping[str, Tensor], operand: Operand) -> Tensor:
    """(H, rows, D)."""
    ((node, first),) = operand.producers
    return samples[node.name][:, operand.channels - first].movedim(1, 0)


def _logits_error(
    q: Tensor,
    k: Tensor,
    rewrite: _Rewrite,
    query_grid: UniformQuantizer,
    key_grid: UniformQuantizer,
) -> float:
    """Squared error of the logits, but for what all keys of a query share, relative to them."""
    query_ratio, key_ratio = (r.float()[:, None] for r in (rewrite.query_ratio, rewrite.key_ratio))
    wide = _relative(rewrite.query_scale) * _relative(rewrite.key_scale)
    made = (
        query_grid(q / query_ratio) @ key_grid((k + rewrite.shift.float()[:, None]) / key_ratio).mT
    )
    exact = q @ k.mT
    lost = made * wide.float()[..., None] - exact
    lost = lost - lost.mean(-1, keepdim=True)
    exact = exact - exact.mean(-1, keepdim=True)
    return float(lost.square().sum() / exact.square().sum().clamp(min=1e-30))


def _apply(
    graph_module: fx.GraphModule,
    group: AttentionGroup,
    rewrite: _Rewrite,
    histograms: dict[Watch, Histogram],
) -> None:
    zero = torch.zeros_like(rewrite.shift)
    moved = bool((rewrite.shift != 0).any())
    fold_query_key(graph_module, group, rewrite.factor, rewrite.shift if moved else None)
    if rewrite.query_scale is not None:
        fold_head_scales(graph_module, group, q=rewrite.query_scale, k=rewrite.key_scale)
    rewrite_operand(histograms, group.query, rewrite.query_ratio, zero)
    rewrite_operand(histograms, group.key, rewrite.key_ratio, rewrite.shift)


def _relative(scales: Tensor | None) -> Tensor:
    """Each head's scale relative to their mean, as ``fold_head_scales`` divides by it: (H, 1)."""
    return (
        torch.ones(1, 1, dtype=torch.float64)
        if scales is None
        else (scales / scales.mean())[:, None]
    )
