"""The 3 x 3 neighbourhoods of a map, by slices: gathered, and summed back where they came from.

What ``unfold`` and ``fold`` do, without operators that some exporters lack, and without the
convolutions by constant kernels that a quantiser would take for layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gather_neighbours", "sum_neighbours"]

_OFFSETS = tuple((row, column) for row in range(3) for column in range(3))


def gather_neighbours(x: Tensor) -> Tensor:
    """Each position's 3 x 3 neighbourhood, row by row, zeros outside the map.

    (N, C, H, W) to (N, 9, C, H, W).
    """
    _, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    return torch.stack([padded[:, :, r : r + height, c : c + width] for r, c in _OFFSETS], dim=1)


def sum_neighbours(x: Tensor) -> Tensor:
    """What every position gives its nine neighbours, summed at the neighbour; what leaves is lost.

    (N, 9, C, H, W) to (N, C, H, W): the transpose of :func:`gather_neighbours`.
    """
    _, _, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    given = [
        padded[:, i, :, 2 - r : 2 - r + height, 2 - c : 2 - c + width]
        for i, (r, c) in enumerate(_OFFSETS)
    ]
    return torch.stack(given).sum(0)
