"""Adaptive polyphase anchoring: Ding et al., *Reviving Shift Equivariance in Vision Transformers*
(2023): a network whose prediction doesn't depend on where patches and windows begin.

Before whatever cuts a map at every p-th pixel, the map is shifted, around its borders, to where the
cut keeps the most energy. Position convolutions go around the borders too. No weight is new, and
names of weights stay: a checkpoint of the host loads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.inserts.registry import register_insert
from deploykit.errors import UsageError

__all__ = ["anchor", "shift"]


def anchor(x: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """Rows and columns by which a map (N, C, H, W) is to be shifted; int64 (N,) each.

    They make the polyphase component of largest norm, of ``period`` x ``period``, the first one.
    """
    _, _, height, width = x.shape
    if height % period or width % period:
        message = f"polyphase anchoring wants maps whose sides {period} divides"
        raise UsageError(f"{message}, not {height} x {width}; choose another image size")
    energy = x.square().sum(1)
    energy = energy.unflatten(2, (-1, period)).unflatten(1, (-1, period)).sum((1, 3))
    place = energy.flatten(1).argmax(1)
    row = torch.div(place, period, rounding_mode="floor")
    return row, place - row * period


def shift(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Each map of (N, C, H, W) moved up and left by as many pixels, around the borders."""
    _, channels, height, width = x.shape
    down = (torch.arange(height, device=x.device) + rows[:, None]) % height
    right = (torch.arange(width, device=x.device) + columns[:, None]) % width
    x = x.gather(2, down[:, None, :, None].expand(-1, channels, -1, width))
    return x.gather(3, right[:, None, None, :].expand(-1, channels, height, -1))


class AnchoredConv(nn.Conv2d):
    """A convolution that strides by its kernel's width, on the anchored map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(shift(x, *anchor(x, self.stride[0])))


class AroundConv(nn.Conv2d):
    """A 3x3 convolution whose padding is the map's other side."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((x[:, :, -1:], x, x[:, :, :1]), dim=2)
        x = torch.cat((x[..., -1:], x, x[..., :1]), dim=3)
        out: Tensor = self._conv_forward(x, self.weight, self.bias)
        return out


class AnchoredWindows(timm.models.twins.LocallyGroupedAttn):  # type: ignore[misc]
    """Window attention on the anchored map, (N, H·W, C), shifted back afterwards."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, size)
        rows, columns = anchor(maps, self.ws)
        tokens = shift(maps, rows, columns).flatten(2).transpose(1, 2)
        y = super().forward(tokens, size).transpose(1, 2).unflatten(2, size)
        return shift(y, -rows, -columns).flatten(2).transpose(1, 2)


@register_insert("polyphase", host="timm's Twins-SVT: windows, subsampled attention, PEG")
def insert(module: nn.Module) -> int:
    """Anchor patches, windows and subsampled keys; send position convolutions around."""
    twins = timm.models.twins
    if not isinstance(module, twins.Twins):
        return 0
    count = 0
    for layer in module.modules():
        if isinstance(layer, twins.LocallyGroupedAttn):
            layer.__class__ = AnchoredWindows  # its weights and their names stay
        elif isinstance(layer, twins.PosConv):
            conv = layer.proj[0]
            conv.__class__, conv.padding = AroundConv, (0, 0)
        elif isinstance(layer, twins.PatchEmbed):
            layer.proj.__class__ = AnchoredConv
        elif isinstance(layer, twins.GlobalSubSampleAttn) and layer.sr is not None:
            layer.sr.__class__ = AnchoredConv
        else:
            continue
        count += 1
    return count
