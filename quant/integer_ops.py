"""Softmax, GELU and LayerNorm on integers alone, after I-ViT, in exact int64 arithmetic.

Z. Li, Q. Gu, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference",
ICCV 2023 (arXiv 2207.01405): Shiftmax (section 3.3), ShiftGELU (3.4), I-LayerNorm (3.5). Written
from the paper's formulas. The authors' own simulation runs on float32, which cannot hold the
31-bit intermediate values; here every step is an integer of 64 bits.

These are crude operators, meant for networks that are trained with them: see
``docs/integer-only.md`` for how crude. Codes are symmetric, ``value = code * scale``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["int_gelu", "int_layer_norm", "int_softmax", "shift_exp"]

_INT32_MAX = 2**31 - 1
_SOFTMAX_SHIFT, _GELU_SHIFT = 15, 23  # n of ShiftExp in the paper's two uses of it
_SIGMOID_SLOPE = 1.702  # GELU(x) ~ x * sigmoid(1.702 x)
_NEWTON_START, _NEWTON_STEPS = 2**16, 10


def shift_exp(codes: Tensor, scale: float, shift: int) -> Tensor:
    """ShiftExp: ``exp(codes * scale)`` from additions and shifts (I-ViT, equations 9 to 13).

    Args:
        codes: integers <= 0, any shape.
        scale: of the codes, positive, below 1 by much (the unit of the exponent is
            ``floor(1 / scale)`` steps, so a coarse scale gives a coarse exponent).
        shift: bits after the binary point; values below ``2**-shift`` end there.

    Returns:
        int64 of the same shape; times ``scale / 2**shift`` it approximates the exponential. The
        error is systematic, from a straight line in place of ``2**x`` and ``1.4375`` in place of
        ``log2(e)``: too large nearly everywhere.
    """
    codes = codes.to(torch.int64)
    codes = codes + (codes >> 1) - (codes >> 4)  # * 1.4375: exp(x) = 2 ** (1.4427 x)
    one = _one(scale)
    codes = codes.clamp_min(-shift * one)
    whole = -codes // one
    rest = codes + whole * one  # in (-one, 0]
    # 2**rest ~ 1 + rest / 2, in units of 1 / one; halved last, for the half bit
    return ((rest + 2 * one) << (shift - whole)) >> 1


def _one(scale: float) -> int:
    """1.0 in steps of ``scale``, the paper's ``-I0``."""
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return -math.floor(-1.0 / scale)


def _fitting_shift(scale: float, terms: int, shift: int) -> int:
    """The paper's shift, or less where a sum of ``terms`` exponentials would pass INT32."""
    room = _INT32_MAX // (terms * _one(scale))
    fitting = room.bit_length() - 1
    if fitting < 1:
        raise ValueError(f"scale {scale:.3g} is too small for {terms} terms in 32 bits")
    return min(shift, fitting)


def _check(codes: Tensor, bits: int) -> None:
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise ValueError(f"wanted integer codes, got {codes.dtype}")
    if not 2 <= bits <= 16:
        raise ValueError(f"wanted 2 to 16 bits, got {bits}")


def _ratio(part: Tensor, whole: Tensor, bits: int) -> Tensor:
    """``part / whole`` in ``bits`` bits with sign, by one division per row and a shift."""
    return (part * (_INT32_MAX // whole)) >> (32 - bits)


def int_softmax(codes: Tensor, scale: float, bits: int = 8, dim: int = -1) -> tuple[Tensor, float]:
    """Shiftmax: softmax over ``dim`` by shifts and one integer division per row.

    Args:
        codes: integers, any shape.
        scale: of the codes.
        bits: of the result. Its codes are cut off, not rounded, so with 8 bits a row of 197 sums
            to well under 1; with 16 to nearly 1.

    Returns:
        int64 codes in ``0 .. 2**(bits - 1) - 1`` and their scale, ``2**-(bits - 1)``.

    Raises:
        ValueError: codes that are no integers, bits outside 2 .. 16, or a scale so small that a
            row's sum passes 32 bits.
    """
    _check(codes, bits)
    codes = codes.to(torch.int64)
    shift = _fitting_shift(scale, codes.shape[dim], _SOFTMAX_SHIFT)
    exponentials = shift_exp(codes - codes.amax(dim, keepdim=True), scale, shift)
    result = _ratio(exponentials, exponentials.sum(dim, keepdim=True), bits)
    return result, 2.0 ** -(bits - 1)


def int_gelu(codes: Tensor, scale: float, bits: int = 8) -> tuple[Tensor, float]:
    """ShiftGELU: ``x * sigmoid(1.702 x)``, the sigmoid by ShiftExp.

    The sigmoid is ``exp(x - m) / (exp(x - m) + exp(-m))`` with ``m`` the largest of the last
    axis or 0. (The paper takes the largest alone; where that is negative, ``exp(-m)`` passes 32
    bits. The quotient is the same for every m.)

    Args:
        codes: integers, any shape.
        scale: of the codes.
        bits: of the sigmoid.

    Returns:
        int64 codes, the product of input and sigmoid codes, and their scale.

    Raises:
        ValueError: as ``int_softmax``.
    """
    _check(codes, bits)
    codes = codes.to(torch.int64)
    slope = _SIGMOID_SLOPE * scale
    shift = _fitting_shift(slope, 2, _GELU_SHIFT)
    largest = codes.amax(-1, keepdim=True).clamp_min(0)
    up, down = shift_exp(codes - largest, slope, shift), shift_exp(-largest, slope, shift)
    sigmoid = _ratio(up, up + down, bits)
    return codes * sigmoid, scale * 2.0 ** -(bits - 1)


def int_layer_norm(codes: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """I-LayerNorm over the last axis: integer mean, and a root by ten Newton steps from 2^16.

    The scale of the input cancels. Ten steps reach roots down to about 64: codes so narrow that
    the root of their sum of squares is less come out too small (16-bit codes avoid it).

    The paper adds ``bias / weight`` to the normalised codes, which is NaN for a weight of 0.
    Here a channel whose bias outweighs its weight gets a coarser scale instead, so that both fit.

    Args:
        codes: integers (..., C).
        weight, bias: float (C,).

    Returns:
        int64 codes (..., C) and their float64 scale (C,), negative where the weight is.

    Raises:
        ValueError: codes that are no integers, or shapes that differ.
    """
    _check(codes, 16)
    if weight.shape != codes.shape[-1:] or bias.shape != weight.shape:
        message = f"wanted weight and bias {tuple(codes.shape[-1:])}, got {tuple(weight.shape)}"
        raise ValueError(f"{message} and {tuple(bias.shape)}")
    codes = codes.to(torch.int64)
    channels = codes.shape[-1]
    # round(sum / channels), halves up
    mean = (2 * codes.sum(-1, keepdim=True) + channels) // (2 * channels)
    centred = codes - mean
    squares = centred.square().sum(-1, keepdim=True)
    root = torch.full_like(squares, _NEWTON_START)
    for _ in range(_NEWTON_STEPS):
        root = (root + squares // root) >> 1
    normalised = (centred * (_INT32_MAX // root)) >> 1  # in units of sqrt(C) / 2**30
    weight, bias = weight.double(), bias.double()
    unit = weight * math.sqrt(channels) / 2**30
    dead = weight == 0
    unit = torch.where(dead, bias.abs().clamp_min(1e-30) / 2**30, unit)
    steps = (bias / unit).abs().clamp_min(1.0)
    coarser = (torch.log2(steps).ceil().to(torch.int64) - 30).clamp_min(0)
    scale = unit * torch.exp2(coarser.double())
    normalised = torch.where(dead, 0, normalised >> coarser.clamp_max(62))
    return normalised + (bias / scale).round().to(torch.int64), scale
