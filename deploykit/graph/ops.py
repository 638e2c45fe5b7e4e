"""The operators a quantised graph is made of, registered with torch.library.

They are what the simulation runs and what every exporter lowers, so both see the same codes.
Rounding is half to even after a true division, ``round(x / scale) + zero_point``, exactly as
ONNX QuantizeLinear defines it: ``x * (1 / scale)`` or adding the zero point before rounding
would give other codes at ties.

Quantisers whose grid isn't uniform hold their ``2**bits`` values in a table. ``step`` > 0 says
that every value is ``step * (k - zero_point)`` with an integer ``k`` of 0 .. 255: an exporter may
then store the ``k`` as uint8 and let the following product run on integers. With ``step`` 0 the
values are any floats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "dequantize",
    "fake_quantize",
    "fake_quantize_log",
    "fake_quantize_twin",
    "log_codes",
    "quantize_codes",
    "twin_codes",
]


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


def log_codes(
    x: Tensor, shift: Tensor | float, rate: Tensor | float, offset: Tensor | float, last: int
) -> Tensor:
    """``clip(round(offset - rate * log2(x + shift)), 0, last)`` as floats.

    Where ``x + shift`` <= 0 the logarithm is minus infinity and the code ``last``: no NaN.

    Args:
        x: float32, any shape.
        shift, rate, offset: broadcastable to ``x``; ``rate`` > 0.
    """
    # relu_ after the sum makes a new tensor first, so ``x`` is left alone.
    codes = (x + shift).relu_().log2_() * -rate
    return codes.add_(offset).round_().clamp_(0, last)


@torch.library.custom_op("deploykit::fake_quantize_log", mutates_args=())
def fake_quantize_log(
    x: Tensor,
    shift: float,
    rate: float,
    offset: float,
    values: Sequence[float],
    step: float,
    zero_point: int,
) -> Tensor:
    """Quantise with codes that are uniform in the logarithm of ``x + shift``.

    ``code = clip(round(offset - rate * log2(x + shift)), 0, len(values) - 1)`` and the result is
    ``values[code]``. With the base ``2**(-1 / rate)``, this is log2 (rate 1), RepQ-ViT's
    log-sqrt2 (2), AdaLog (37 / q) and I&S-ViT's shift-uniform-log2 (any rate, a shift).

    Args:
        x: float32, any shape. Values of ``-shift`` and below get the last code.
        shift, rate, offset: exactly representable in float32; ``rate`` > 0.
        values: ``2**bits`` floats, exactly representable in float32, none rising.
        step, zero_point: see the head of this module.

    Returns:
        float32 of the same shape.
    """
    codes = log_codes(x, shift, rate, offset, len(values) - 1)
    return torch.tensor(values, dtype=x.dtype, device=x.device)[codes.long()]


@fake_quantize_log.register_fake
def _(
    x: Tensor,
    shift: float,
    rate: float,
    offset: float,
    values: Sequence[float],
    step: float,
    zero_point: int,
) -> Tensor:
    return torch.empty_like(x)


def twin_codes(
    x: Tensor,
    split: Tensor | float,
    low_step: Tensor | float,
    high_step: Tensor | float,
    last: int,
) -> Tensor:
    """Codes of two uniform grids that meet at ``split``, as floats in ``0 .. last``.

    ``clip(round((x - split) / step) + (last + 1) / 2, 0, last)``, where ``step`` is ``low_step``
    below ``split`` and ``high_step`` from it on.

    Args:
        x: float32, any shape.
        split, low_step, high_step: broadcastable to ``x``; the steps positive.
        last: ``2**bits - 1``.
    """
    steps = torch.where(x < split, low_step, high_step).to(x.dtype)
    return ((x - split) / steps).round_().add_((last + 1) // 2).clamp_(0, last)


@torch.library.custom_op("deploykit::fake_quantize_twin", mutates_args=())
def fake_quantize_twin(
    x: Tensor,
    split: float,
    low_step: float,
    high_step: float,
    values: Sequence[float],
    step: float,
    zero_point: int,
) -> Tensor:
    """Quantise on two uniform grids that meet at ``split`` (PTQ4ViT, arXiv 2111.12293, eq. 6).

    Args:
        x: float32, any shape.
        split, low_step, high_step: of ``twin_codes``, exactly representable in float32.
        values: ``2**bits`` floats, exactly representable in float32, none falling.
        step, zero_point: see the head of this module.

    Returns:
        float32 of the same shape, ``values[code]``.
    """
    codes = twin_codes(x, split, low_step, high_step, len(values) - 1)
    return torch.tensor(values, dtype=x.dtype, device=x.device)[codes.long()]


@fake_quantize_twin.register_fake
def _(
    x: Tensor,
    split: float,
    low_step: float,
    high_step: float,
    values: Sequence[float],
    step: float,
    zero_point: int,
) -> Tensor:
    return torch.empty_like(x)
