"""Masks of exact counts from scores: what stays is True. Ties keep what comes first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_sums", "keep_largest", "keep_n_of_m", "lamp_scores", "spread_blocks"]


def keep_n_of_m(scores: Tensor, keep: int, group: int) -> Tensor:
    """The ``keep`` largest of each ``group`` consecutive columns.

    Args:
        scores: (rows, columns), columns divisible by ``group``.

    Returns:
        bool (rows, columns), exactly ``keep`` True in every group.
    """
    groups = scores.reshape(len(scores), -1, group)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
    return mask.reshape(scores.shape)


def keep_largest(scores: Tensor, zeros: int) -> Tensor:
    """All but the ``zeros`` smallest scores, of any shape; bool of that shape."""
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[order[scores.numel() - zeros :]] = False
    return mask.reshape(scores.shape)


def block_sums(scores: Tensor, block: int) -> Tensor:
    """Sums over squares: (rows, columns) to (rows / block, columns / block)."""
    rows, columns = scores.shape
    return scores.reshape(rows // block, block, columns // block, block).sum((1, 3))


def spread_blocks(mask: Tensor, block: int) -> Tensor:
    """A mask of blocks as one of weights, ``block_sums``'s shapes reversed."""
    return mask.repeat_interleave(block, 0).repeat_interleave(block, 1)


def lamp_scores(scores: Tensor) -> Tensor:
    """Scores of one layer made comparable with those of others: a part of what would be left.

    ``s_u / sum of the scores that are s_u or more`` (LAMP, arXiv 2010.07611, eq. 5, there with
    ``s = w^2``; of equals the first counts as more). The largest of a layer gets 1, so that no
    layer is emptied before the others are.

    Args:
        scores: not negative, additive (squared weights or output errors), any shape.

    Returns:
        float64 of that shape, in the same order as ``scores``.
    """
    flat = scores.flatten().double()
    order = flat.argsort(stable=True, descending=True)
    left = flat[order].cumsum(0)
    result = torch.empty_like(flat)
    result[order] = torch.where(left > 0, flat[order] / left.clamp(min=1e-300), 0.0)
    return result.reshape(scores.shape)
