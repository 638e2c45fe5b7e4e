"""The moving average of the weights that are trained: what is judged, and what is returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["decay_at", "moving_average"]


def decay_at(updates: int, decay: float) -> float:
    """The decay of an update after so many: short at first, so that a short run isn't left behind.

    ``min(decay, (1 + n) / (10 + n))``, as in TensorFlow's ``ExponentialMovingAverage``.
    """
    return min(decay, (1 + updates) / (10 + updates))


def moving_average(module: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``module`` whose ``update_parameters`` follows it: ``d * mean + (1 - d) * new``.

    The first update copies.
    """
    return AveragedModel(module, multi_avg_fn=_follow(decay))


def _follow(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    @torch.no_grad()
    def follow(mean: Sequence[Tensor], new: Sequence[Tensor], updates: Tensor | int) -> None:
        torch._foreach_lerp_(list(mean), list(new), 1 - decay_at(int(updates), decay))

    return follow
