"""What quantisers with a table of values share: the search, and the values' own 8-bit grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deploykit.quant.observers import Histogram
from deploykit.quant.ranges import MIN_SCALE, TAILS

__all__ = ["best_candidate", "onto_bytes", "settle", "upper_ends"]

_CHUNK = 256  # candidates searched together: bounds memory at 256 * 2048 floats, 2 MB


def upper_ends(histogram: Histogram, range_method: str) -> Tensor:
    """Upper ends of the range to try, float32 (T,): the maximum, or several percentiles."""
    tails = torch.tensor(TAILS if range_method != "minmax" else (0.0,))
    counts = histogram.counts[0]
    cumulative = counts.flip(0).cumsum(0)
    # Bins wholly inside the tail are dropped; with a tail of 0 none is, and the end is exact.
    dropped = torch.searchsorted(cumulative, tails * counts.sum(), right=True)
    dropped = torch.where(tails > 0, dropped, 0).clamp(max=len(counts) - 1)
    width = (histogram.high[0] - histogram.low[0]) / len(counts)
    return (histogram.high[0] - dropped * width).clamp(min=MIN_SCALE)


def onto_bytes(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round tables of values onto 256 equal steps, of which 0.0 is one.

    Args:
        values: float32 (..., L).

    Returns:
        The rounded values (..., L), the step (..., 1), and the zero point (..., 1), an integer of
        0 .. 255, all float32: ``value = step * (k - zero_point)`` with ``k`` in 0 .. 255.
    """
    low = values.amin(-1, keepdim=True).clamp(max=0)
    high = values.amax(-1, keepdim=True).clamp(min=0)
    # Divided first: the width of a range of +-3e38 overflows.
    step = (high / 255 - low / 255).clamp(min=MIN_SCALE / 255)
    zero_point = torch.round(-low / step)
    codes = (torch.round(values / step) + zero_point).clamp(0, 255)
    return (codes - zero_point) * step, step, zero_point


def settle(values: Tensor, code_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Make quantising twice the same as quantising once.

    A rounded value may lie where another code reads it. The nearest of the values that are read
    as themselves then takes its place, which keeps the order. There is one at least: reading is
    monotone, and a monotone map of a finite chain into itself has a fixed point.

    Args:
        values: (L,), monotone.
        code_of: the quantiser's codes of some values.
    """
    own = values[values[code_of(values).long()] == values]
    return own[(values[:, None] - own).abs().argmin(1)]


def best_candidate(
    histogram: Histogram,
    values: Tensor,
    code_of: Callable[[Tensor, slice], Tensor],
) -> int:
    """Which candidate has the least squared error on the histogram.

    Args:
        values: float32 (K, L), each candidate's table.
        code_of: given (B,) inputs and some candidates, their codes, (candidates, B).
    """
    present = histogram.counts[0] > 0
    centres, counts = histogram.centres[0][present], histogram.counts[0][present].double()
    # Relative to the widest value: the square of an outlier of 1e30 overflows.
    widest = torch.maximum(histogram.low[0].abs(), histogram.high[0].abs()).clamp(min=MIN_SCALE)
    errors = []
    for start in range(0, len(values), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        found = values[chunk].gather(1, code_of(centres, chunk).long())
        errors.append(found.sub_(centres).div_(widest).square_().double() @ counts)
    return int(torch.cat(errors).argmin())
