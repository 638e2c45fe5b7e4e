"""How many weights or blocks each layer loses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deploykit.prune.masks import keep_largest, lamp_scores

__all__ = ["global_zeros", "uniform_zeros"]


def uniform_zeros(units: Mapping[str, int], sparsity: float) -> dict[str, int]:
    """The same part of every layer, rounded.

    Args:
        units: weights or blocks of each layer.
        sparsity: part of them, 0 to 1.
    """
    return {name: round(count * sparsity) for name, count in units.items()}


def global_zeros(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """What costs least over all layers, by LAMP scores; exactly ``round(units * sparsity)``.

    Args:
        scores: of each layer's weights or blocks, any shape, not negative.
    """
    together = torch.cat([lamp_scores(part).flatten() for part in scores.values()])
    mask = keep_largest(together, round(len(together) * sparsity))
    parts = mask.split([part.numel() for part in scores.values()])
    return {name: int((~part).sum()) for name, part in zip(scores, parts, strict=True)}
