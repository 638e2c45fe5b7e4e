"""HorNet: Rao et al., *HorNet: Efficient High-Order Spatial Interactions with Recursive Gated
Convolutions* (NeurIPS 2022).

Modules are named as in the official checkpoints, which load as they are. The ``gf`` versions
filter in the frequency domain (Global Filter Networks); the transform is written as products
with constant matrices (``layers/dft.py``), because runtimes lack it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.dft import RealFourier2d
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["HorNet", "hornet"]

_DEPTHS = (2, 3, 18, 2)
_ORDERS = (2, 3, 4, 5)
_WIDTHS = {"tiny": 64, "small": 96, "base": 128, "large": 192}
_SCALE = 1 / 3  # of the depthwise result: keeps a product of several from growing
_OFFICIAL_FILTERS = {2: (14, 8), 3: (7, 4)}  # stage: rows and columns of the half spectrum


class GlobalLocalFilter(nn.Module):
    """Half of the channels by a 3x3 depthwise convolution, half by a filter in frequency.

    (N, C, H, W) to the same, the halves interleaved channel by channel (paper, section 3.1).
    ``filter_shape`` is that of the learned filter, resized to the map's spectrum where it differs.
    """

    def __init__(self, dim: int, side: int, filter_shape: tuple[int, int]) -> None:
        super().__init__()
        half = dim // 2
        self.dw = nn.Conv2d(half, half, 3, padding=1, bias=False, groups=half)
        self.complex_weight = nn.Parameter(torch.randn(half, *filter_shape, 2) * 0.02)
        self.pre_norm = timm.layers.LayerNorm2d(dim)
        self.post_norm = timm.layers.LayerNorm2d(dim)
        self.spectrum = (side, side // 2 + 1)
        self.fourier = RealFourier2d(side, side)

    def forward(self, x: Tensor) -> Tensor:
        local, everywhere = self.pre_norm(x).chunk(2, dim=1)
        weight = self.complex_weight.permute(3, 0, 1, 2)
        if tuple(weight.shape[2:]) != self.spectrum:
            weight = F.interpolate(weight, self.spectrum, mode="bilinear", align_corners=True)
        a, b = weight[0], weight[1]
        real, imag = self.fourier.transform(everywhere)
        everywhere = self.fourier.inverse(real * a - imag * b, real * b + imag * a)
        mixed: Tensor = self.post_norm(torch.stack((self.dw(local), everywhere), 2).flatten(1, 2))
        return mixed


class GnConv(nn.Module):
    """Recursive gated convolution of an order (eq. 3.3 to 3.6): (N, C, H, W) to the same."""

    def __init__(self, dim: int, order: int, mixer: nn.Module) -> None:
        super().__init__()
        self.dims = [dim // 2**i for i in reversed(range(order))]
        self.proj_in = nn.Conv2d(dim, 2 * dim, 1)
        self.dwconv = mixer
        self.proj_out = nn.Conv2d(dim, dim, 1)
        self.pws = nn.ModuleList(
            nn.Conv2d(self.dims[i], self.dims[i + 1], 1) for i in range(order - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, rest = self.proj_in(x).split((self.dims[0], sum(self.dims)), dim=1)
        gates = (self.dwconv(rest) * _SCALE).split(self.dims, dim=1)
        x = first * gates[0]
        for pw, gate in zip(self.pws, gates[1:], strict=True):
            x = pw(x) * gate
        out: Tensor = self.proj_out(x)
        return out


class Block(nn.Module):
    """``x += g1 gnconv(LN x); x += g2 MLP(LN x)`` on (N, C, H, W)."""

    def __init__(self, dim: int, gnconv: GnConv) -> None:
        super().__init__()
        self.norm1 = timm.layers.LayerNorm2d(dim)
        self.gnconv = gnconv
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma1 = nn.Parameter(1e-6 * torch.ones(dim))
        self.gamma2 = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1.view(-1, 1, 1) * self.gnconv(self.norm1(x))
        y = self.pwconv2(self.act(self.pwconv1(self.norm2(x.permute(0, 2, 3, 1)))))
        out: Tensor = x + (self.gamma2 * y).permute(0, 3, 1, 2)
        return out


class HorNet(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(
        self,
        width: int,
        filters: dict[int, tuple[int, int]],
        num_classes: int,
        img_size: int,
        depths: tuple[int, ...] = _DEPTHS,
    ) -> None:
        super().__init__()
        norm = timm.layers.LayerNorm2d
        dims = [width * 2**i for i in range(4)]
        stem = nn.Sequential(nn.Conv2d(3, dims[0], 4, stride=4), norm(dims[0]))
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in itertools.pairwise(dims):
            down = nn.Sequential(norm(before), nn.Conv2d(before, after, 2, stride=2))
            self.downsample_layers.append(down)
        self.stages = nn.ModuleList()
        for stage, (dim, depth, order) in enumerate(zip(dims, depths, _ORDERS, strict=True)):
            side = img_size // 2 ** (stage + 2)
            blocks = [
                Block(dim, GnConv(dim, order, _mixer(dim, order, side, filters.get(stage))))
                for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        scores: Tensor = self.head(self.norm(x.mean((2, 3))))
        return scores


def _mixer(dim: int, order: int, side: int, filter_shape: tuple[int, int] | None) -> nn.Module:
    """What mixes positions: 7x7 depthwise, or the frequency filter where the stage has one."""
    channels = sum(dim // 2**i for i in range(order))
    if filter_shape is None:
        return nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
    return GlobalLocalFilter(channels, side, filter_shape)


def _variant(name: str, params_m: float, *, headline: bool = False) -> Variant:
    size, kind = name.removeprefix("HorNet-").lower().split()
    plain = (f"hornet_{size}",) if kind == "7x7" else ()
    return Variant(paper_name=name, params_m=params_m, also=plain, headline=headline)


@register_backbone(
    "HorNet",
    {
        "hornet_tiny_7x7": _variant("HorNet-T 7x7", 22.41, headline=True),
        "hornet_tiny_gf": _variant("HorNet-T GF", 22.99),
        "hornet_small_7x7": _variant("HorNet-S 7x7", 49.53),
        "hornet_small_gf": _variant("HorNet-S GF", 50.40),
        "hornet_base_7x7": _variant("HorNet-B 7x7", 87.26),
        "hornet_base_gf": _variant("HorNet-B GF", 88.42),
        "hornet_large_7x7": _variant("HorNet-L 7x7", 194.54),
        "hornet_large_gf": _variant("HorNet-L GF", 196.29),
    },
    licence="mit",
    doc=87,
)
def hornet(variant: str, *, num_classes: int, img_size: int) -> HorNet:
    """HorNet of one size; ``img_size`` is a multiple of 32.

    A filter keeps the official shape (that of 224 pixels) and is resized to the map's spectrum.
    """
    check_side("HorNet", img_size)
    _, size, kind = variant.split("_")
    filters = _OFFICIAL_FILTERS if kind == "gf" else {}
    return HorNet(_WIDTHS[size], filters, num_classes, img_size)
