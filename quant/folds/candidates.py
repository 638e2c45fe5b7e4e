"""Candidate rewrites of a norm's output: a ratio and a shift for every channel.

Folding one makes the output ``(x + shift) / ratio``; which of them is best is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deploykit.quant.ranges import MIN_SCALE, UniformRange

__all__ = ["Center", "NormCandidate", "repq_candidate"]

Center = Literal["mean", "median", "clipped"]
_FENCE = 1.5  # of the interquartile range: Tukey's usual bound for outliers


@dataclass(frozen=True)
class NormCandidate:
    """A rewrite of a norm's output as ``(x + shift) / ratio``.

    Attributes:
        name: for records, such as ``repq-mean``.
        ratio: float64 (C,), positive.
        shift: float64 (C,).
        scale, zero_point: the grid of the rewritten output where the candidate implies one;
            None where it has to be calibrated.
    """

    name: str
    ratio: Tensor
    shift: Tensor
    scale: float | None = None
    zero_point: int | None = None


def repq_candidate(channels: UniformRange, bits: int, center: Center = "mean") -> NormCandidate:
    """RepQ's candidate: quantising per channel becomes quantising with one common grid.

    With ``s, z`` of every channel and the common ``s~, z~``: ``ratio = s / s~`` and
    ``shift = s (z - z~)`` (RepQ-ViT, arXiv 2212.08254, eq. 6 to 9).

    ``mean`` is RepQ's centre and ``median`` DopQ-ViT's (arXiv 2408.03291). ``s~`` multiplies all
    columns of the next weights alike, so under weights scaled per output channel the two give
    the same codes, but where ``z~`` is rounded or clamped. ``clipped`` first bounds each
    channel's scale by 1.5 interquartile ranges beyond the quartiles, the middle of its range
    kept, so that a few wide channels lose their tails and the weights are spread less: our
    reading of LRP-QViT's clipped channel-wise quantisation (arXiv 2401.11243), which gives no
    formula in its abstract.

    Args:
        channels: scale and zero point (C,), as if quantised per channel.
        bits: width of the codes; bounds the common zero point.

    Returns:
        The candidate with its scale and zero point. ``z~`` is rounded: RepQ's own code leaves
        it fractional, which gives ``2**bits + 1`` codes.
    """
    scale, zero_point = channels.scale.double(), channels.zero_point.double()
    if center == "clipped":
        clipped = _clip_outliers(scale)
        middle = (2**bits - 1) / 2
        zero_point = (middle - (middle - zero_point) * scale / clipped).round()
        scale = clipped
    if center == "median":
        common, common_zero = scale.median(), zero_point.median()
    elif center == "clipped":
        common, common_zero = scale.mean(), _clip_outliers(zero_point).mean()
    else:
        common, common_zero = scale.mean(), zero_point.mean()
    common_scale = float(common.float())
    zero = int(common_zero.round().clamp(0, 2**bits - 1))
    return NormCandidate(
        name=f"repq-{center}",
        ratio=scale / common_scale,
        shift=scale * (zero_point - zero),
        scale=common_scale,
        zero_point=zero,
    )


def _clip_outliers(values: Tensor) -> Tensor:
    """Values (C,) bounded by Tukey's fences; positive values stay positive."""
    first, third = torch.quantile(values, values.new_tensor([0.25, 0.75]))
    reach = _FENCE * (third - first)
    low = first - reach
    if bool((values > 0).all()):
        low = low.clamp(min=MIN_SCALE)
    return values.clamp(low, third + reach)
