"""Learned bias of attention by the distance of two positions, per head, along both axes.

Shaw et al., *Self-Attention with Relative Position Representations* (2018), in the two-axis form of
CoAtNet and Swin: ``scores[h, p, q] += table[h, row_q - row_p, column_q - column_p]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["relative_index", "resized_bias"]


def relative_index(side: int) -> Tensor:
    """Where each pair of positions of a ``side`` square finds its distance in a flattened table.

    int64 (side², side²), for tables of (2 side - 1)² distances, row by row.
    """
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    down = rows[None] - rows[:, None] + side - 1
    right = columns[None] - columns[:, None] + side - 1
    return down * (2 * side - 1) + right


def resized_bias(table: Tensor, side: int) -> Tensor:
    """A table (heads, D, D) for another side, bilinearly: (heads, 2 side - 1, 2 side - 1)."""
    width = 2 * side - 1
    if table.shape[-1] == width:
        return table
    resized: Tensor = F.interpolate(table[None], (width, width), mode="bilinear")[0]
    return resized
