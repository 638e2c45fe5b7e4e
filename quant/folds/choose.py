"""Which rewrite of a norm's output loses least, measured on the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.quant.folds.candidates import NormCandidate, repq_candidate
from deploykit.quant.folds.norm import NormGroup, consumer_absmax
from deploykit.quant.folds.smooth import ALPHAS, smooth_candidate
from deploykit.quant.histograms import merged
from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.ranges import RangeMethod, activation_range, weight_scale

__all__ = ["FoldChoice", "choose_fold", "norm_candidates"]

SAMPLE_ROWS = 1024
ROUGH_STEPS = 8  # of the weights' scales: candidates are compared, not made

FoldChoice = tuple[NormCandidate, UniformQuantizer]


def norm_candidates(
    graph_module: fx.GraphModule,
    group: NormGroup,
    channels: Histogram,
    bits: int,
    kind: str,
    method: RangeMethod,
) -> list[FoldChoice]:
    """The rewrites that ``norm_fold`` names, each with the grid it comes with.

    Args:
        channels: histogram of the norm's output per channel.
        kind: ``auto`` gives all of them, the unchanged output among them.
    """
    names = {"repq": ["mean"], "repq-median": ["median"], "repq-clipped": ["clipped"]}
    centres = names.get(kind, ["mean", "clipped"] if kind == "auto" else [])
    result = []
    if centres:
        ranges = activation_range(channels, bits, method, include_zero=False)
        for centre in centres:
            candidate = repq_candidate(ranges, bits, centre)  # type: ignore[arg-type]
            assert candidate.scale is not None and candidate.zero_point is not None
            grid = UniformQuantizer(candidate.scale, candidate.zero_point, bits)
            result.append((candidate, grid))
    if kind in ("auto", "smooth"):
        one = torch.ones(len(channels.low), dtype=torch.float64)
        others = [NormCandidate("off", one, torch.zeros_like(one))]
        absmax = consumer_absmax(graph_module, group)
        for alpha in ALPHAS:
            others.append(smooth_candidate(channels.low, channels.high, absmax, alpha, False))
        others.append(smooth_candidate(channels.low, channels.high, absmax, 0.5, True))
        for candidate in others:
            found = activation_range(
                merged(channels, candidate.ratio, candidate.shift), bits, method
            )
            grid = UniformQuantizer(float(found.scale[0]), int(found.zero_point[0]), bits)
            result.append((candidate, grid))
    return result


@torch.no_grad()
def choose_fold(
    graph_module: fx.GraphModule,
    group: NormGroup,
    candidates: Sequence[FoldChoice],
    sample: Tensor,
    weight_bits: Sequence[int],
    weight_range: str,
    weight_share: float = 1.0,
) -> tuple[FoldChoice, dict[str, float]]:
    """The candidate whose readers' outputs are nearest to the float ones.

    The error of the quantised input and that of the quantised weights are added up. Rewrites that
    narrow the one widen the other.

    Args:
        sample: the norm's output, channels last, (rows, C).
        weight_bits: of each consumer.
        weight_share: how much of the error of rounding weights to the nearest code remains:
            1, or less where they will be rounded with error feedback.

    Returns:
        The best, and every candidate's squared error relative to the outputs' square.
    """
    rows = sample[torch.linspace(0, len(sample) - 1, min(SAMPLE_ROWS, len(sample))).long()]
    errors: dict[str, float] = {}
    for candidate, grid in candidates:
        ratio, shift = candidate.ratio.float(), candidate.shift.float()
        folded = (rows + shift) / ratio
        back = grid(folded)
        lost = total = 0.0
        for layer, columns, bits in zip(group.consumers, group.columns, weight_bits, strict=True):
            weight = _matrix(graph_module, layer)
            ours = columns >= 0
            weight, at = weight[:, ours], columns[ours]
            wide = weight * ratio[at]
            high = 2 ** (bits - 1)
            scale = weight_scale(wide, bits, weight_range, steps=ROUGH_STEPS)[:, None]  # type: ignore[arg-type]
            rounding = torch.round(wide / scale).clamp_(-high, high - 1) * scale - wide
            of_input = (back - folded)[:, at] @ wide.t()
            of_weight = folded[:, at] @ rounding.t()
            of_weight -= of_weight.mean(0)  # the bias takes the mean
            lost += float(of_input.square().sum() + weight_share * of_weight.square().sum())
            total += float((rows[:, at] @ weight.t()).square().sum())
        errors[candidate.name] = lost / max(total, 1e-30)
    best = min(range(len(candidates)), key=lambda i: errors[candidates[i][0].name])
    return candidates[best], errors


def _matrix(graph_module: fx.GraphModule, layer: fx.Node) -> Tensor:
    """A layer's weight as (out, in); a larger kernel as the sum over its positions."""
    weight = constant(graph_module, layer.args[1])
    assert weight is not None
    return weight.float().flatten(2).sum(2) if weight.ndim > 2 else weight.float()
