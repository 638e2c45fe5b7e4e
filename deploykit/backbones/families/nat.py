"""NAT and DiNAT: neighbourhood attention, dense and dilated, in plain torch.

Hassani et al., *Neighborhood Attention Transformer* (CVPR 2023); Hassani and Shi, *Dilated
Neighborhood Attention Transformer* (2022). Keys and values are gathered by an index that depends
on the size alone, so that no extension is needed and the network exports. Modules are named as in
the official checkpoints, which load as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.registry import Variant, register_backbone
from deploykit.errors import UsageError

__all__ = ["NAT", "dinat", "nat", "neighbours"]

_KERNEL = 7
_DILATIONS = (8, 4, 2, 1)  # every second block of DiNAT's stages, for maps of 56, 28, 14 and 7


class _Size(NamedTuple):
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float
    layer_scale: bool = False


_SIZES = {
    "mini": _Size(64, (3, 4, 6, 5), (2, 4, 8, 16), 3),
    "tiny": _Size(64, (3, 4, 18, 5), (2, 4, 8, 16), 3),
    "small": _Size(96, (3, 4, 18, 5), (3, 6, 12, 24), 2),
    "base": _Size(128, (3, 4, 18, 5), (4, 8, 16, 32), 2, layer_scale=True),
    "large": _Size(192, (3, 4, 18, 5), (6, 12, 24, 48), 2),
}


def neighbours(length: int, dilation: int) -> tuple[Tensor, Tensor]:
    """The window of each position along one axis: places, and offsets counted from 0 to 12.

    Both int64 (length, 7). Positions that agree modulo ``dilation`` form a line of their own; the
    window of a position is the seven nearest of its line, shifted inwards at the ends, never
    padded (NAT, section 3; DiNAT, section 3). Offset 6 is the position itself.
    """
    places = torch.arange(length, device="cpu")
    line, step = places % dilation, places // dilation
    on_line = (length - line + dilation - 1) // dilation
    start = torch.minimum((step - _KERNEL // 2).clamp(min=0), on_line - _KERNEL)
    steps = start[:, None] + torch.arange(_KERNEL, device="cpu")
    return steps * dilation + line[:, None], steps - step[:, None] + _KERNEL - 1


class NeighborhoodAttention(nn.Module):
    """Attention of each pixel to the 7×7 nearest; (N, H, W, C) to (N, H, W, C).

    ``rpb`` (heads, 13, 13) is added by relative place. A window that covers the whole map is
    ordinary attention, and written so.
    """

    keys: Tensor
    places: Tensor

    def __init__(self, dim: int, heads: int, side: int, dilation: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * _KERNEL - 1, 2 * _KERNEL - 1))
        self.proj = nn.Linear(dim, dim)
        self.whole = side == _KERNEL
        where, offset = neighbours(side, dilation)
        keys = where[:, None, :, None] * side + where[None, :, None, :]
        places = offset[:, None, :, None] * (2 * _KERNEL - 1) + offset[None, :, None, :]
        window = _KERNEL**2
        # (queries · keys) for gathering keys, (queries, keys) for the bias; row by row both
        self.register_buffer("keys", keys.reshape(-1), persistent=False)
        self.register_buffer("places", places.reshape(-1, window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, HW, d)
        bias = self.rpb.flatten(1)[:, self.places]  # (heads, HW, 49)
        q = q * self.scale
        if self.whole:
            out = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        else:
            k, v = (t.index_select(2, self.keys).unflatten(2, (-1, _KERNEL**2)) for t in (k, v))
            scores = q.unsqueeze(3) @ k.transpose(-2, -1) + bias.unsqueeze(2)
            out = (scores.softmax(-1) @ v).squeeze(3)
        out = self.proj(out.transpose(1, 2).flatten(2))
        x = out.unflatten(1, (self.side, self.side))
        return x


class NATLayer(nn.Module):
    """``x += g1 attention(LN x); x += g2 MLP(LN x)`` on (N, H, W, C); g1, g2 in the base size."""

    def __init__(self, size: _Size, stage: int, side: int, dilation: int) -> None:
        super().__init__()
        dim = size.width * 2**stage
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(dim, size.heads[stage], side, dilation)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, int(dim * size.mlp_ratio))
        self.layer_scale = size.layer_scale
        if size.layer_scale:
            self.gamma1 = nn.Parameter(torch.full((dim,), 1e-5))
            self.gamma2 = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + (self.gamma1 * y if self.layer_scale else y)
        y = self.mlp(self.norm2(x))
        x = x + (self.gamma2 * y if self.layer_scale else y)
        return x


class ConvTokenizer(nn.Module):
    """Two strided 3×3 convolutions, LayerNorm: (N, 3, S, S) to (N, S / 4, S / 4, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x


class ConvDownsampler(nn.Module):
    """Strided 3×3 convolution, LayerNorm: (N, H, W, C) to (N, H / 2, W / 2, 2 C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x


class NATBlock(nn.Module):
    """One stage: its layers, then the way down to the next."""

    def __init__(self, size: _Size, stage: int, side: int, dilated: bool) -> None:
        super().__init__()
        dilations = (1, _DILATIONS[stage] if dilated else 1)
        self.blocks = nn.Sequential(
            *(
                NATLayer(size, stage, side, dilations[index % 2])
                for index in range(size.depths[stage])
            )
        )
        last = stage == len(size.depths) - 1
        self.downsample = None if last else ConvDownsampler(size.width * 2**stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


class NAT(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(self, size: _Size, dilated: bool, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.patch_embed = ConvTokenizer(size.width)
        self.levels = nn.Sequential(
            *(NATBlock(size, stage, img_size // 2 ** (stage + 2), dilated) for stage in range(4))
        )
        self.norm = nn.LayerNorm(8 * size.width)
        self.head = nn.Linear(8 * size.width, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.levels(self.patch_embed(x)))
        scores: Tensor = self.head(x.mean((1, 2)))
        return scores


def _build(variant: str, dilated: bool, num_classes: int, img_size: int) -> NAT:
    if img_size < 32 * _KERNEL or img_size % 32:
        message = f"{variant} takes images whose side is a multiple of 32, at least {32 * _KERNEL}"
        raise UsageError(f"{message} (its windows are not padded), not {img_size}")
    return NAT(_SIZES[variant.rsplit("_", 1)[1]], dilated, num_classes, img_size)


@register_backbone(
    "NAT",
    {
        "nat_mini": Variant(paper_name="NAT-Mini", params_m=20.0, headline=True),
        "nat_tiny": Variant(paper_name="NAT-Tiny", params_m=27.9),
        "nat_small": Variant(paper_name="NAT-Small", params_m=50.7),
        "nat_base": Variant(paper_name="NAT-Base", params_m=89.8),
    },
    licence="mit",
    doc=19,
)
def nat(variant: str, *, num_classes: int, img_size: int) -> NAT:
    """NAT of one size; ``img_size`` is a multiple of 32, at least 224."""
    return _build(variant, False, num_classes, img_size)


@register_backbone(
    "DiNAT",
    {
        "dinat_mini": Variant(paper_name="DiNAT-Mini", params_m=20.0, headline=True),
        "dinat_tiny": Variant(paper_name="DiNAT-Tiny", params_m=27.9),
        "dinat_small": Variant(paper_name="DiNAT-Small", params_m=50.7),
        "dinat_base": Variant(paper_name="DiNAT-Base", params_m=89.8),
        "dinat_large": Variant(paper_name="DiNAT-Large", params_m=200.9),
    },
    licence="mit",
    doc=19,
)
def dinat(variant: str, *, num_classes: int, img_size: int) -> NAT:
    """DiNAT of one size; ``img_size`` is a multiple of 32, at least 224.

    Dilations are those of 224 pixels at every size.
    """
    return _build(variant, True, num_classes, img_size)
