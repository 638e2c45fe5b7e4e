"""ELA: Xu and Wan, *ELA: Efficient Local Attention for Deep Convolutional Neural Networks* (2024).

Placed where squeeze-and-excitation would be: in ResNet's blocks before the sum, in MobileNetV2's
after the depthwise convolution.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor, nn

from deploykit.backbones.inserts.registry import register_insert

__all__ = ["EfficientLocalAttention"]


class _Kind(NamedTuple):
    """Kernel, channels a group of the convolution (0: one each), groups of the GroupNorm."""

    kernel: int
    grouped: int
    norm_groups: int


_KINDS = {
    "ela_t": _Kind(5, 0, 32),
    "ela_b": _Kind(7, 0, 16),
    "ela_s": _Kind(5, 8, 16),
    "ela_l": _Kind(7, 8, 16),
}


class EfficientLocalAttention(nn.Module):
    """``x * sigmoid(GN(F_h(row means))) * sigmoid(GN(F_w(column means)))``; float32 (N, C, H, W).

    The one-dimensional convolutions are written as k×1 and 1×k. Where the paper's number of
    groups doesn't divide the channels, their largest common divisor is taken.
    """

    def __init__(self, channels: int, kernel: int, grouped: int, norm_groups: int) -> None:
        super().__init__()
        groups = math.gcd(channels, channels // grouped) if grouped else channels
        half = kernel // 2
        self.rows = nn.Conv2d(
            channels, channels, (kernel, 1), padding=(half, 0), groups=groups, bias=False
        )
        self.columns = nn.Conv2d(
            channels, channels, (1, kernel), padding=(0, half), groups=groups, bias=False
        )
        self.rows_norm = nn.GroupNorm(math.gcd(channels, norm_groups), channels)
        self.columns_norm = nn.GroupNorm(math.gcd(channels, norm_groups), channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows_norm(self.rows(x.mean(3, keepdim=True))).sigmoid()
        columns = self.columns_norm(self.columns(x.mean(2, keepdim=True))).sigmoid()
        x = x * rows * columns
        return x


def insert(module: nn.Module, kind: _Kind) -> int:
    """Fill every empty squeeze-and-excitation slot of a block."""
    count = 0
    for block in module.modules():
        if not hasattr(block, "se") or not isinstance(block.se, nn.Identity | None):
            continue
        channels = _channels(block)
        if channels:
            block.se = EfficientLocalAttention(channels, *kind)
            count += 1
    return count


def _channels(block: nn.Module) -> int:
    """Channels that reach a block's slot, 0 where that isn't known."""
    for name in ("conv_dw", "conv3", "conv2"):  # inverted residuals, bottlenecks, basic blocks
        layer = getattr(block, name, None)
        if isinstance(layer, nn.Conv2d):
            return layer.out_channels
    return 0


for _name, _kind in _KINDS.items():
    register_insert(_name, host="blocks with an empty squeeze-and-excitation slot, as in ResNet")(
        functools.partial(insert, kind=_kind)
    )
