"""Choosing a range: from a histogram (activations) or from the values themselves (weights)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from deploykit.quant.observers import CHANNEL_BINS, Histogram

__all__ = ["ERROR_POWER", "MIN_SCALE", "RangeMethod", "UniformRange", "activation_range",
           "error_power", "weight_scale"]  # fmt: skip

RangeMethod = Literal["minmax", "percentile", "percentile-mse", "progressive"]

# Below this a scale is noise: dividing by it overflows, and a constant zero tensor needs some
# positive scale. Any value serves such a tensor, since all its codes are the zero point.
MIN_SCALE = 1e-8

# Parts of the values left out at each end. 0 is min-max; the widest pays at 3 and 4 bits only.
TAILS = (0.0, 1e-6, 1e-5, 5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 7e-3, 1e-2, 2e-2, 4e-2)
# One channel has few values: shorter tails than these hold none of them.
CHANNEL_TAILS = (0.0, 2e-4, 1e-3, 2e-3, 4e-3, 1e-2, 2e-2, 4e-2)
# Power of the error that "percentile" minimises, by width. Chosen on a real ViT at 8, 6 and 4 bits
# (benchmarks/accuracy.py vit --set quantize.activation_range=percentile-mse shows the difference).
ERROR_POWER = {2: 3.0, 3: 3.0, 4: 3.0, 5: 4.0, 6: 4.0, 7: 10.0, 8: 10.0}
_CHUNK = 16  # channels searched together: bounds memory at 16 * 169 * 512 floats, 6 MB

WEIGHT_SHRINK_STEPS = 32

# The progressive search: how far scales are spread in each round, how many grids go on to it,
# and into how many scales each is split (with three zero points for every one).
PROGRESSIVE_STEPS = (0.1, 0.03, 0.01)
PROGRESSIVE_KEPT = 8
PROGRESSIVE_SPLIT = 7


class UniformRange:
    """Scale and integer zero point of an unsigned uniform grid, one per channel.

    Attributes:
        scale: float32 (C,), at least MIN_SCALE.
        zero_point: float32 (C,), integer valued.
        error: float64 (C,), mean squared error on the histogram.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, error: Tensor) -> None:
        self.scale, self.zero_point, self.error = scale, zero_point, error


def error_power(bits: int, method: RangeMethod) -> float:
    """The power of the error that a method minimises at a width."""
    return 2.0 if method in ("minmax", "percentile-mse") else ERROR_POWER.get(bits, 2.0)


def activation_range(
    histogram: Histogram,
    bits: int,
    method: RangeMethod = "percentile",
    *,
    include_zero: bool = True,
) -> UniformRange:
    """Asymmetric range with an integer zero point.

    ``percentile-mse`` tries all pairs of lower and upper tails in ``TAILS`` and keeps the
    pair with the least squared error per channel (the initialisation of RepQ-ViT and its
    successors, with both ends free). ``percentile`` does so with the error's power in
    ``ERROR_POWER``: a few huge activations carry a vision transformer's decisions, and a squared
    error gives them away for a little less rounding noise elsewhere. ``progressive`` goes on from
    there: the best few are split into finer scales and neighbouring zero points, and so on (the
    fast progressive combining search of AdaLog, arXiv 2407.12951, section 3.4, with the error of
    the tensor for score).

    Args:
        histogram: counts of C channels (1 for a whole tensor).
        bits: width of the codes.
        include_zero: widen every range to hold 0.0 exactly. Needed wherever a padded zero may
            meet the quantiser, and for a zero point inside the codes.
    """
    searched = CHANNEL_TAILS if histogram.counts.shape[1] <= CHANNEL_BINS else TAILS
    tails = torch.tensor(searched if method != "minmax" else (0.0,))
    power = error_power(bits, method)
    parts = [
        _search(
            Histogram(
                histogram.low[start : start + _CHUNK],
                histogram.high[start : start + _CHUNK],
                histogram.counts[start : start + _CHUNK],
            ),
            bits,
            tails,
            include_zero,
            power,
            PROGRESSIVE_STEPS if method == "progressive" else (),
        )
        for start in range(0, len(histogram.low), _CHUNK)
    ]
    return UniformRange(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _search(
    histogram: Histogram,
    bits: int,
    tails: Tensor,
    include_zero: bool,
    power: float,
    refinements: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    low, high = _percentiles(histogram, tails)  # (C, T) each
    count = len(tails)
    low = low.repeat_interleave(count, dim=1)  # (C, T*T), every pair
    high = high.repeat(1, count)
    if include_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    levels = 2**bits - 1
    scale = ((high - low) / levels).clamp(min=MIN_SCALE)
    zero_point = torch.round(-low / scale)
    if include_zero:
        zero_point = zero_point.clamp(0, levels)
    score, mse = _errors(histogram, scale, zero_point, bits, power)
    for spread in refinements:
        kept = score.topk(min(PROGRESSIVE_KEPT, score.shape[1]), dim=1, largest=False).indices
        scale, zero_point = scale.gather(1, kept), zero_point.gather(1, kept)
        factors = torch.linspace(1 - spread, 1 + spread, PROGRESSIVE_SPLIT)
        scale = (scale[:, :, None] * factors).flatten(1).clamp(min=MIN_SCALE)
        zero_point = zero_point.repeat_interleave(PROGRESSIVE_SPLIT, dim=1)
        moved = [zero_point + move for move in (-1, 0, 1)]
        scale, zero_point = scale.repeat(1, 3), torch.cat(moved, dim=1)
        if include_zero:
            zero_point = zero_point.clamp(0, levels)
        score, mse = _errors(histogram, scale, zero_point, bits, power)
    best = score.argmin(dim=1, keepdim=True)
    widest = torch.maximum(histogram.low.abs(), histogram.high.abs()).clamp(min=MIN_SCALE)
    return (
        scale.gather(1, best)[:, 0],
        zero_point.gather(1, best)[:, 0],
        mse.gather(1, best)[:, 0].double() * widest.double().square(),
    )


def _errors(
    histogram: Histogram, scale: Tensor, zero_point: Tensor, bits: int, power: float
) -> tuple[Tensor, Tensor]:
    """Sum of |error|^power and mean squared error of candidate grids (C, T), relative to the
    widest value: the square of an outlier of 1e30 overflows, and inf * 0 is NaN."""
    centres = histogram.centres[:, None, :]
    codes = torch.round(centres / scale[..., None]).add_(zero_point[..., None])
    codes = codes.clamp_(0, 2**bits - 1)
    widest = torch.maximum(histogram.low.abs(), histogram.high.abs()).clamp(min=MIN_SCALE)
    error = codes.sub_(zero_point[..., None]).mul_(scale[..., None]).sub_(centres)
    error = error.div_(widest[:, None, None]).square_()
    total = histogram.counts.sum(1).clamp(min=1)
    counts = histogram.counts[:, None, :]
    mse = (error * counts).sum(-1) / total[:, None]
    score = mse if power == 2 else (error.pow_(power / 2) * counts).sum(-1)
    return score, mse


def _percentiles(histogram: Histogram, tails: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper ends that leave out each tail, (C, T) each."""
    bins = histogram.counts.shape[1]
    width = (histogram.high - histogram.low)[:, None] / bins
    total = histogram.counts.sum(1, keepdim=True)
    cumulative = histogram.counts.cumsum(1)
    wanted = (tails[None, :] * total).contiguous()
    # Bins wholly inside the tail are dropped; with a tail of 0 none is, and the ends are exact.
    below = torch.searchsorted(cumulative.contiguous(), wanted, right=True)
    below = torch.where(tails[None, :] > 0, below, 0)
    from_top = histogram.counts.flip(1).cumsum(1).contiguous()
    above = torch.searchsorted(from_top, wanted, right=True)
    above = torch.where(tails[None, :] > 0, above, 0)
    low = histogram.low[:, None] + below.clamp(max=bins - 1) * width
    high = histogram.high[:, None] - above.clamp(max=bins - 1) * width
    return low, torch.maximum(high, low)


def weight_scale(
    weight: Tensor,
    bits: int,
    method: Literal["minmax", "mse"] = "mse",
    axis: int = 0,
    steps: int | None = None,
) -> Tensor:
    """Symmetric per-channel scale for codes ``-2**(bits-1) .. 2**(bits-1)-1``.

    ``mse`` shrinks the min-max scale in steps and keeps the least squared error per channel.

    Args:
        steps: how many scales are tried; fewer for a rough answer.

    Returns:
        float32 (C,), at least MIN_SCALE, so an all-zero channel gives zero codes, never NaN.
    """
    rows = weight.detach().movedim(axis, 0).flatten(1).float()
    positive, negative = 2 ** (bits - 1) - 1, -(2 ** (bits - 1))
    widest: Tensor = (rows.abs().amax(1) / positive).clamp(min=MIN_SCALE)
    if method == "minmax":
        return widest
    # At 8 bits nothing below 3/4 of the range ever wins; at 2 bits down to a fifth can.
    lowest = {2: 0.2, 3: 0.25, 4: 0.35, 5: 0.5, 6: 0.6, 7: 0.7}.get(bits, 0.75)
    steps = steps or (WEIGHT_SHRINK_STEPS if bits < 7 else WEIGHT_SHRINK_STEPS // 2)
    best_scale = widest.clone()
    best_error = torch.full_like(widest, torch.inf)
    for factor in torch.linspace(lowest, 1.0, steps).tolist():
        scale = widest * factor
        codes = torch.round(rows / scale[:, None]).clamp_(negative, positive)
        error = codes.mul_(scale[:, None]).sub_(rows).square_().sum(1)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale.clamp(min=MIN_SCALE)
