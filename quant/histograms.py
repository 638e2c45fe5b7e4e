"""Histograms of rewritten tensors, from those of the tensors before."""

from __future__ import annotations

import torch
from torch import Tensor

from deploykit.quant.observers import TENSOR_BINS, Histogram

__all__ = ["merged"]


def merged(channels: Histogram, ratio: Tensor, shift: Tensor) -> Histogram:
    """One histogram of all channels, each rewritten as ``(x + shift) / ratio``.

    Every bin's count goes to where its middle lands; the extremes are exact.

    Args:
        channels: per-channel counts.
        ratio, shift: (C,), ratio positive.
    """
    ratio, shift = ratio.float(), shift.float()
    low = float(((channels.low + shift) / ratio).min())
    high = float(((channels.high + shift) / ratio).max())
    width = high - low if high > low else 1.0
    values = (channels.centres + shift[:, None]) / ratio[:, None]
    index = ((values - low) * (TENSOR_BINS / width)).long().clamp_(0, TENSOR_BINS - 1)
    counts = torch.zeros(TENSOR_BINS)
    counts.scatter_add_(0, index.flatten(), channels.counts.flatten())
    return Histogram(torch.tensor([low]), torch.tensor([high]), counts[None])
