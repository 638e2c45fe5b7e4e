"""Weights and biases as integer codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deploykit.quant.ranges import weight_scale

__all__ = [
    "QuantizedBias",
    "QuantizedWeight",
    "quantize_bias",
    "quantize_weight",
    "safe_scale",
    "symmetric_codes",
]

_BIAS_CODES = 2**30  # leaves a bit of the int32 accumulator for the products


@dataclass(frozen=True)
class QuantizedWeight:
    """Symmetric codes of a weight with output channels on axis 0.

    Attributes:
        codes: int8, the weight's shape, ``-2**(bits-1) .. 2**(bits-1)-1``.
        scale: float32 (out,).
    """

    codes: Tensor
    scale: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        return self.codes.float() * self.scale.reshape(-1, *[1] * (self.codes.ndim - 1))


@dataclass(frozen=True)
class QuantizedBias:
    """int32 codes of a bias on the accumulator's grid, ``input scale * weight scale``."""

    codes: Tensor
    scale: Tensor


def quantize_weight(
    weight: Tensor,
    bits: int,
    method: Literal["minmax", "mse"] = "mse",
    *,
    bias: Tensor | None = None,
    input_scale: float | None = None,
) -> QuantizedWeight:
    """Round a weight to symmetric per-output-channel codes.

    Args:
        weight: float32, output channels on axis 0.
        bits: 2 to 8.
        bias, input_scale: if given, a channel's scale is kept large enough for its bias to fit
            int32 codes. That matters for all-zero channels, whose scale is otherwise arbitrary.
    """
    scale = safe_scale(weight, bits, method, bias, input_scale)
    codes = symmetric_codes(weight.float(), scale.reshape(-1, *[1] * (weight.ndim - 1)), bits)
    return QuantizedWeight(codes.to(torch.int8), scale, bits)


def safe_scale(
    weight: Tensor,
    bits: int,
    method: Literal["minmax", "mse"],
    bias: Tensor | None,
    input_scale: float | None,
) -> Tensor:
    """``weight_scale``, float32 (out,), with which the bias fits int32 codes, too."""
    scale = weight_scale(weight, bits, method)
    if bias is None or input_scale is None:
        return scale
    return torch.maximum(scale, bias.abs().float() / (input_scale * _BIAS_CODES))


def symmetric_codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes ``-2**(bits-1) .. 2**(bits-1)-1`` as floats; scale broadcasts to weight."""
    return torch.round(weight / scale).clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def quantize_bias(bias: Tensor, input_scale: float, weight: QuantizedWeight) -> QuantizedBias:
    """Round a bias (out,) to int32 codes of scale ``input_scale * weight.scale``."""
    scale = weight.scale * input_scale
    codes = torch.round(bias.double() / scale.double()).clamp_(-_BIAS_CODES, _BIAS_CODES)
    return QuantizedBias(codes.to(torch.int32), scale)
