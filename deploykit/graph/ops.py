"""The operators a quantised graph is made of, registered with torch.library.

They are what the simulation runs and what every exporter lowers, so both see the same codes.
Rounding is half to even after a true division, ``round(x / scale) + zero_point``, exactly as
ONNX QuantizeLinear defines it: ``x * (1 / scale)`` or adding the zero point before rounding
would give other codes at ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dequantize", "fake_quantize", "fake_quantize_log_sqrt2", "quantize_codes"]


def quantize_codes(x: Tensor, scale: Tensor | float, zero_point: Tensor | int, bits: int) -> Tensor:
    """Unsigned uniform codes ``clip(round(x / scale) + zero_point, 0, 2**bits - 1)`` as floats.

    Args:
        x: any shape, float32.
        scale: positive, broadcastable to ``x``.
        zero_point: integer valued, broadcastable to ``x``.
        bits: width of the codes.
    """
    return torch.round(x / scale).add_(zero_point).clamp_(0, 2**bits - 1)


@torch.library.custom_op("deploykit::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """Quantise and dequantise per tensor with ``2**bits`` unsigned codes.

    Args:
        x: float32, any shape.
        scale: positive, exactly representable in float32.
        zero_point: integer in ``0 .. 255``, the code of 0.0 (it may exceed ``2**bits - 1`` only
            where 0.0 is outside the range).
        bits: 2 to 8.

    Returns:
        float32 of the same shape, ``scale * (code - zero_point)``.
    """
    return quantize_codes(x, scale, zero_point, bits).sub_(zero_point).mul_(scale)


@fake_quantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("deploykit::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int, bits: int) -> Tensor:
    """Dequantise symmetric per-channel codes of a weight or bias.

    Args:
        codes: int8 (weights) or int32 (biases), any shape.
        scale: float32, ``(codes.shape[axis],)``.
        axis: channel axis.
        bits: width the codes need on disk; int8 codes of 4 bits are packed by exporters.

    Returns:
        float32 of the shape of ``codes``.
    """
    shape = [1] * codes.ndim
    shape[axis] = -1
    return codes.to(torch.float32) * scale.reshape(shape)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, bits: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("deploykit::fake_quantize_log_sqrt2", mutates_args=())
def fake_quantize_log_sqrt2(x: Tensor, scale: float, bits: int) -> Tensor:
    """Quantise non-negative values on the grid ``scale * 2**(-code / 2)``.

    ``code = round(-2 log2(x / scale))``, clamped at 0; codes of ``2**bits - 1`` and beyond all
    mean 0.0, so there are exactly ``2**bits`` values and zero is one of them (RepQ-ViT,
    arXiv 2212.08254, eq. 11, with the last code given to zero).

    Args:
        x: float32, any shape, values >= 0.
        scale: positive; values above it saturate at it.
        bits: 2 to 8.
    """
    last = 2**bits - 1
    # log2(0) = -inf gives code +inf, which the last code takes: zero stays zero.
    code = torch.round(torch.log2(x / scale).mul_(-2.0)).clamp_(0, last)
    value = torch.exp2(code * -0.5).mul_(scale)
    return torch.where(code >= last, torch.zeros_like(value), value)


@fake_quantize_log_sqrt2.register_fake
def _(x: Tensor, scale: float, bits: int) -> Tensor:
    return torch.empty_like(x)
