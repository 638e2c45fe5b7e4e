"""2:4 sparse tensors at half their values: of each four consecutive entries two are stored.

The layout is that of sparse tensor cores in spirit (values, and two bits that say where each was),
not the bytes of a vendor's library.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_two_of_four", "pack_two_of_four", "unpack_two_of_four"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_two_of_four(tensor: Tensor, axis: int) -> bool:
    """Whether at most two of each four consecutive entries along ``axis`` aren't zero.

    Minus zero counts as a value, so that a packed tensor comes back bit for bit. A tensor of
    zeros alone isn't: nobody pruned it.
    """
    if tensor.ndim <= axis or tensor.shape[axis] % 4 or not tensor.numel():
        return False
    count = _used(_groups(tensor, axis)).sum(-1)
    return bool((count.amax() <= 2) & (count.amax() > 0))


def pack_two_of_four(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The stored half of a tensor, and where it was.

    Args:
        tensor: one that ``is_two_of_four`` along ``axis``; float or integer, any shape.

    Returns:
        The values, ``tensor``'s shape and type with ``axis`` half as long; and uint8
        ``(ceil(groups / 2),)``: of each group of four, in the order of the tensor with ``axis``
        last, the two positions (2 bits each, the first lower), two groups a byte, the first lower.
    """
    groups = _groups(tensor, axis)
    order = _used(groups).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    places = order[..., :2].sort(-1).values
    values = groups.gather(-1, places).flatten(-2).movedim(-1, axis).contiguous()
    nibbles = (places[..., 0] | places[..., 1] << 2).flatten().to(torch.uint8)
    if len(nibbles) % 2:
        nibbles = torch.cat([nibbles, nibbles.new_zeros(1)])
    low, high = nibbles.reshape(-1, 2).unbind(1)
    return values, low | high << 4


def unpack_two_of_four(values: Tensor, positions: Tensor, axis: int) -> Tensor:
    """The tensor that ``pack_two_of_four`` packed, bit for bit.

    Raises:
        ValueError: the positions don't belong to the values, or aren't what packing gives.
    """
    halves = values.movedim(axis, -1)
    if halves.shape[-1] % 2:
        raise ValueError("an odd number of packed values along the axis")
    pairs = halves.reshape(*halves.shape[:-1], -1, 2)
    groups = pairs.shape[:-1].numel()
    if positions.dtype != torch.uint8 or positions.shape != (-(-groups // 2),):
        raise ValueError("positions of another size or type than the packed values")
    nibbles = torch.stack([positions & 15, positions >> 4], 1).flatten()
    if bool(nibbles[groups:].any()):
        raise ValueError("positions after the last group")
    places = torch.stack([nibbles[:groups] & 3, nibbles[:groups] >> 2], 1).long()
    if bool((places[:, 0] >= places[:, 1]).any()):
        raise ValueError("positions of a group out of order")
    whole = pairs.new_zeros(*pairs.shape[:-1], 4)
    whole.scatter_(-1, places.reshape(pairs.shape), pairs)
    moved = whole.flatten(-2).movedim(-1, axis)
    # Not contiguous(): it keeps odd strides of axes of length 1, by which torch picks another
    # convolution, with other last digits.
    return moved.clone(memory_format=torch.contiguous_format)


def _groups(tensor: Tensor, axis: int) -> Tensor:
    moved = tensor.movedim(axis, -1)
    return moved.reshape(*moved.shape[:-1], -1, 4)


def _used(tensor: Tensor) -> Tensor:
    """Where a bit is set."""
    return tensor.contiguous().view(_BITS[tensor.element_size()]) != 0
