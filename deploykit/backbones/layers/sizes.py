"""Between maps and sequences, and the sizes a family can be built for."""

from __future__ import annotations

from torch import Tensor

from deploykit.errors import UsageError

__all__ = ["check_side", "to_map", "to_tokens"]


def check_side(family: str, img_size: int, multiple: int = 32) -> int:
    """``img_size`` where it is a positive multiple of ``multiple`` pixels.

    Raises:
        UsageError: it isn't, and the family's maps would not fit its windows or strides.
    """
    if img_size < multiple or img_size % multiple:
        below = max(multiple, img_size // multiple * multiple)
        message = f"{family} takes images whose side is a multiple of {multiple} pixels"
        raise UsageError(f"{message}, not {img_size}: use {below} or {below + multiple}")
    return img_size


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, HW, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(x: Tensor, height: int, width: int) -> Tensor:
    """(N, HW, C) to (N, C, H, W)."""
    out: Tensor = x.transpose(1, 2).unflatten(2, (height, width))
    return out
