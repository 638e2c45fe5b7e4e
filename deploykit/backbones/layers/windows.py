"""Maps cut into windows and put together again, at any batch size.

The batch is what ``-1`` stands for; numbers of windows come from the map's sides, which are fixed
when the network is built. (Deriving the batch from the number of windows freezes it on export.)
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["cut_windows", "join_windows"]


def cut_windows(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(N, H, W, C) to (N · windows, h, w, C); the sides of ``window`` divide those of the map."""
    _, height, width, channels = x.shape
    h, w = window
    x = x.reshape(-1, height // h, h, width // w, w, channels)
    return x.transpose(2, 3).reshape(-1, h, w, channels)


def join_windows(x: Tensor, side: tuple[int, int]) -> Tensor:
    """(N · windows, h, w, C) to (N, H, W, C); ``side`` is (H, W). Undoes :func:`cut_windows`."""
    _, h, w, channels = x.shape
    height, width = side
    x = x.reshape(-1, height // h, width // w, h, w, channels)
    return x.transpose(2, 3).reshape(-1, height, width, channels)
