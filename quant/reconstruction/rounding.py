"""AdaRound: a weight whose rounding, down or up, is learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit.quant.weights import QuantizedWeight

__all__ = ["AdaRoundWeight"]

_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid reaches 0 and 1, where its gradient is 0


class AdaRoundWeight(nn.Module):
    """``s * clip(floor(W / s) + h(V))`` with ``h`` a stretched, clipped sigmoid.

    AdaRound (arXiv 2004.10568, eq. 22 to 24). V starts where ``h`` gives W back exactly, or, given
    codes, half way from there to the side they chose. A weight that is 0, as one that was pruned,
    keeps code 0.

    Attributes:
        logits: V, the weight's shape.
    """

    scale: Tensor
    floor: Tensor
    keep: Tensor

    def __init__(self, weight: Tensor, start: QuantizedWeight) -> None:
        super().__init__()
        self.bits = start.bits
        shape = [-1] + [1] * (weight.ndim - 1)
        self.register_buffer("scale", start.scale.reshape(shape))
        ratio = weight / self.scale
        low, high = self.limits
        # Where error feedback moved a weight by more than a step, start from the code's own floor.
        floor = torch.floor(ratio)
        codes = start.codes.float()
        floor = torch.where(codes < floor, codes, torch.where(codes > floor + 1, codes - 1, floor))
        self.register_buffer("floor", floor.clamp_(low, high))
        self.register_buffer("keep", weight != 0)
        rest = (ratio - floor).clamp(0.01, 0.99)
        chosen = (codes - floor).clamp(0, 1)
        rest = 0.5 * (rest + (0.5 + 0.4 * (2 * chosen - 1)))
        unit = (rest - _LOW) / (_HIGH - _LOW)
        self.logits = nn.Parameter(torch.logit(unit))

    @property
    def limits(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def soft(self) -> Tensor:
        """h(V), in 0 to 1."""
        return (torch.sigmoid(self.logits) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self) -> Tensor:
        low, high = self.limits
        codes = (self.floor + self.soft()).clamp(low, high)
        result: Tensor = codes * self.keep * self.scale
        return result

    def penalty(self, beta: float) -> Tensor:
        """``sum 1 - |2 h - 1|^beta``: pushes every h to 0 or 1."""
        return ((1 - (2 * self.soft() - 1).abs().pow(beta)) * self.keep).sum()

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        """The codes it came to."""
        low, high = self.limits
        codes = (self.floor + (self.soft() >= 0.5)).clamp(low, high) * self.keep
        return QuantizedWeight(codes.to(torch.int8), self.scale.flatten(), self.bits)
