"""E2GC: Jha et al., *E2GC: Energy-efficient Group Convolution in Deep Neural Networks* (2020).

Groups of one size all over the network, instead of depthwise convolutions (groups of 1, which
reuse nothing) or a constant number of groups (whose size grows with the width).
"""

from __future__ import annotations

import functools
import math
from typing import Any

from torch import nn

from deploykit.backbones.inserts.registry import register_insert

__all__ = ["constant_groups"]

_SIZES = (8, 16, 32)


def constant_groups(conv: nn.Conv2d, size: int) -> nn.Conv2d | None:
    """A convolution like ``conv`` in groups of ``size`` channels, None where it is one already.

    Where ``size`` doesn't divide the channels, the largest common divisor is taken.
    """
    width = math.gcd(conv.in_channels, conv.out_channels)
    groups = conv.in_channels // math.gcd(width, size)
    if groups == conv.groups:
        return None
    changed: type[nn.Conv2d] = type(conv)  # timm's own kinds pad in their own ways
    options: dict[str, Any] = {
        name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation")
    }
    bias = conv.bias is not None
    return changed(conv.in_channels, conv.out_channels, groups=groups, bias=bias, **options)


def insert(module: nn.Module, size: int) -> int:
    """Replace every grouped convolution with a kernel larger than 1 by one of the fixed size."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Conv2d) or child.groups == 1:
                continue
            if max(child.kernel_size) == 1 or child.in_channels != child.out_channels:
                continue
            made = constant_groups(child, size)
            if made is not None:
                setattr(parent, name, made)
                count += 1
    return count


for _size in _SIZES:
    register_insert(f"e2gc_{_size}", host="grouped or depthwise convolutions larger than 1×1")(
        functools.partial(insert, size=_size)
    )
