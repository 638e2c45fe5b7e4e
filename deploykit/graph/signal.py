"""Signal to quantisation noise."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["decibels", "sqnr_db"]


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """``10 log10(|reference|^2 / |reference - other|^2)`` in dB.

    inf where they are equal; -inf where ``other`` isn't finite or the reference is all zero.
    """
    signal = reference.double().square().sum()
    noise = (reference.double() - other.double()).square().sum()
    return decibels(float(signal), float(noise))


def decibels(signal: float, noise: float) -> float:
    """The ratio of two sums of squares, as ``sqnr_db`` gives it."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf
