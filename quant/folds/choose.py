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
) -> tuple[FoldChoice, dict[str, float]]:
    """The candidate whose readers' outputs are nearest to the float ones.

    Input and weights are both quantised, weights to the nearest code.

    Args:
        sample: the norm's output, channels last, (rows, C).
        weight_bits: of each consumer.

    Returns:
        The best, and every candidate's squared error relative to the outputs' square.
    """
    rows = sample[torch.linspace(0, len(sample) - 1, min(SAMPLE_ROWS, len(sample))).long()]
    errors: dict[str, float] = {}
    for candidate, grid in candidates:
        ratio, shift = candidate.ratio.float(), candidate.shift.float()
        back = grid((rows + shift) / ratio)
        lost = total = 0.0
        for layer, columns, bits in zip(group.consumers, group.columns, weight_bits, strict=True):
            weight = constant(graph_module, layer.args[1])
            assert weight is not None
            weight = weight.float().flatten(2).sum(2) if weight.ndim > 2 else weight.float()
            ours = columns >= 0
            weight, at = weight[:, ours], columns[ours]
            wanted = rows[:, at] @ weight.t()
            folded = weight * ratio[at]
            scale = weight_scale(folded, bits, weight_range)[:, None]  # type: ignore[arg-type]
            high = 2 ** (bits - 1)
            codes = torch.round(folded / scale).clamp_(-high, high - 1)
            made = back[:, at] @ (codes * scale).t() - weight @ shift[at]
            lost += float((made - wanted).square().sum())
            total += float(wanted.square().sum())
        errors[candidate.name] = lost / max(total, 1e-30)
    best = min(range(len(candidates)), key=lambda i: errors[candidates[i][0].name])
    return candidates[best], errors
