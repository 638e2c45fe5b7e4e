"""Activation quantisers that can be learnt through, with QDrop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer

__all__ = ["LearntActivation", "drop_quantization"]


def drop_quantization(
    quantized: Tensor, original: Tensor, probability: float, generator: torch.Generator
) -> Tensor:
    """Each element stays unquantised with ``probability`` (QDrop, arXiv 2203.05740, eq. 9)."""
    if probability <= 0:
        return quantized
    # Bytes are four times as fast to draw as floats, and fine enough for a coin.
    draws = torch.empty(quantized.shape, dtype=torch.uint8).random_(generator=generator)
    keep = draws < round(256 * probability)
    return torch.where(keep, original, quantized)


class LearntActivation(nn.Module):
    """A quantiser with straight-through gradients; a uniform one's scale is learnt (LSQ).

    A logarithmic one passes its gradient through unchanged and keeps its parameters.
    """

    def __init__(self, quantizer: FittedQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        uniform = isinstance(quantizer, UniformQuantizer)
        self.scale = nn.Parameter(torch.tensor(quantizer.scale)) if uniform else None  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        quantizer = self.quantizer
        if self.scale is None:
            with torch.no_grad():
                delta = quantizer(x.detach()) - x.detach()
            return x + delta
        assert isinstance(quantizer, UniformQuantizer)
        z = quantizer.zero_point
        ratio = x / self.scale
        rounded = ratio + (torch.round(ratio) - ratio).detach()
        return (rounded.clamp(0 - z, 2**quantizer.bits - 1 - z)) * self.scale

    @torch.no_grad()
    def harden(self) -> FittedQuantizer:
        """With the scale it came to."""
        if self.scale is None:
            return self.quantizer
        assert isinstance(self.quantizer, UniformQuantizer)
        scale = max(float(self.scale), 1e-8)
        return UniformQuantizer(scale, self.quantizer.zero_point, self.quantizer.bits)
