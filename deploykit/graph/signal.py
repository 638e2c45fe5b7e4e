"""Signal to quantisation noise."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sqnr_db"]


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """``10 log10(|reference|^2 / |reference - other|^2)`` in dB.

    inf where they are equal; -inf where ``other`` isn't finite or the reference is all zero.
    """
    signal = reference.double().square().sum()
    noise = (reference.double() - other.double()).square().sum()
    if noise == 0:
        return float("inf")
    if signal == 0 or not torch.isfinite(noise):
        return float("-inf")
    return float(10 * torch.log10(signal / noise))
