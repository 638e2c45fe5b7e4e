"""STViT: Huang et al., *Vision Transformer with Super Token Sampling* (CVPR 2023), also "SViT".

Pixels are softly assigned to the nine super tokens around them; attention is among super tokens,
and its result is handed back to the pixels. Not STViT-R (semantic tokens), which drops tokens.
The official repository names its checkpoints' tensors in ways that aren't established here, so
they are not converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.neighbours import gather_neighbours, sum_neighbours
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["STViT", "SuperTokenAttention", "stvit"]

_CELLS = (8, 4, 1, 1)  # side of a super token's cell in each stage; 1 is ordinary attention
_LAST = 1024


@dataclass(frozen=True)
class _Size:
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    has_layer_scale: bool = True


_SIZES = {
    "stvit_s": _Size((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), has_layer_scale=False),
    "stvit_b": _Size((96, 192, 384, 512), (4, 6, 14, 6), (2, 3, 6, 8)),
    "stvit_l": _Size((96, 192, 448, 640), (4, 7, 19, 8), (2, 3, 7, 10)),
}


class ResidualDepthwise(nn.Module):
    """``x + DW3(x)``: where a position is, told by its neighbours."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv(x)
        return out


class MapAttention(nn.Module):
    """Attention of all positions of a (N, C, H, W) map to all."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        qkv = self.qkv(x).flatten(2).unflatten(1, (self.heads, 3, -1))  # (N, h, 3, d, H·W)
        q, k, v = qkv.unbind(2)
        attention = ((q * self.scale).transpose(-2, -1) @ k).softmax(-1)
        y = v @ attention.transpose(-2, -1)
        out: Tensor = self.proj(y.flatten(1, 2).unflatten(2, (shape[2], shape[3])))
        return out


class SuperTokenAttention(nn.Module):
    """Attention among super tokens of cells of ``cell`` x ``cell`` positions (eq. 3 to 9).

    (N, C, H, W) to itself; the sides are multiples of ``cell``. One iteration of assignment.
    """

    def __init__(self, dim: int, heads: int, cell: int) -> None:
        super().__init__()
        self.cell, self.scale = cell, dim**-0.5
        self.stoken_refine = MapAttention(dim, heads)

    def forward(self, x: Tensor) -> Tensor:
        s, (height, width) = self.cell, (x.shape[2] // self.cell, x.shape[3] // self.cell)
        pixels = x.unflatten(3, (width, s)).unflatten(2, (height, s))  # (N, C, h, s, w, s)
        pixels = pixels.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)  # (N, hw, s², C)
        near = _by_cell(gather_neighbours(F.avg_pool2d(x, s)))  # (N, hw, 9, C)
        affinity = ((pixels * self.scale) @ near.transpose(-2, -1)).softmax(-1)  # (N, hw, s², 9)
        given = affinity.transpose(-2, -1) @ pixels  # (N, hw, 9, C)
        share = affinity.sum(2).unsqueeze(-1)  # (N, hw, 9, 1)
        tokens = sum_neighbours(_by_map(given, height, width))
        tokens = tokens / (sum_neighbours(_by_map(share, height, width)) + 1e-12)
        near = _by_cell(gather_neighbours(self.stoken_refine(tokens)))
        out: Tensor = (affinity @ near).unflatten(2, (s, s)).unflatten(1, (height, width))
        out = out.permute(0, 5, 1, 3, 2, 4)  # (N, C, h, s, w, s)
        result: Tensor = out.flatten(4, 5).flatten(2, 3)
        return result


def _by_cell(x: Tensor) -> Tensor:
    """(N, 9, C, h, w) to (N, hw, 9, C)."""
    return x.flatten(3).permute(0, 3, 1, 2)


def _by_map(x: Tensor, height: int, width: int) -> Tensor:
    """(N, hw, 9, C) to (N, 9, C, h, w)."""
    out: Tensor = x.permute(0, 2, 3, 1).unflatten(3, (height, width))
    return out


class Mlp(nn.Module):
    """PW to 4C, GELU, ``h + DW3(h)``, PW; on (N, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.conv = ResidualDepthwise(4 * dim)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.conv(F.gelu(self.fc1(x))))
        return out


class Block(nn.Module):
    """``x += DW3(x); x += STA(LN x); x += MLP(BN x)`` on (N, C, H, W) (fig. 2)."""

    def __init__(self, dim: int, heads: int, cell: int, *, has_layer_scale: bool) -> None:
        super().__init__()
        self.pos_embed = ResidualDepthwise(dim)
        self.norm1 = timm.layers.LayerNorm2d(dim)
        self.attn = SuperTokenAttention(dim, heads, cell) if cell > 1 else MapAttention(dim, heads)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim)
        self.has_layer_scale = has_layer_scale
        if has_layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), 1e-6))
            self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pos_embed(x)
        y: Tensor = self.attn(self.norm1(x))
        x = x + (self.gamma_1 * y if self.has_layer_scale else y)
        y = self.mlp(self.norm2(x))
        out: Tensor = x + (self.gamma_2 * y if self.has_layer_scale else y)
        return out


def _stem(dim: int) -> nn.Sequential:
    """Four 3 x 3 convolutions, each with GELU and BN; the first and third halve the map."""
    layers: list[nn.Module] = []
    widths = ((3, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1))
    for before, out, stride in widths:
        conv = nn.Conv2d(before, out, 3, stride, 1)
        layers += [conv, nn.GELU(), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers)


class STViT(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes)."""

    def __init__(self, size: _Size, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.patch_embed = _stem(size.dims[0])
        self.layers, self.downsamples = nn.ModuleList(), nn.ModuleList()
        stages = zip(size.dims, size.depths, size.heads, _CELLS, strict=True)
        for i, (dim, depth, heads, cell) in enumerate(stages):
            if i:
                conv = nn.Conv2d(size.dims[i - 1], dim, 3, 2, 1, bias=False)
                self.downsamples.append(nn.Sequential(conv, nn.BatchNorm2d(dim)))
            scaled = size.has_layer_scale and i >= 2
            blocks = (Block(dim, heads, cell, has_layer_scale=scaled) for _ in range(depth))
            self.layers.append(nn.Sequential(*blocks))
        self.proj = nn.Conv2d(size.dims[-1], _LAST, 1)
        self.norm = nn.BatchNorm2d(_LAST)
        self.head = nn.Linear(_LAST, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](self.patch_embed(x))
        for downsample, stage in zip(self.downsamples, self.layers[1:], strict=True):
            x = stage(downsample(x))
        x = F.silu(self.norm(self.proj(x)))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


# The official code counts 162 constants a block as parameters (25.50, 51.70, 94.98 M): kernels by
# which it gathers neighbourhoods, which are slices here.
@register_backbone(
    "STViT",
    {
        "stvit_s": Variant(paper_name="STViT-S", params_m=25.50, also=("svit_s",), headline=True),
        "stvit_b": Variant(paper_name="STViT-B", params_m=51.69, also=("svit_b",)),
        "stvit_l": Variant(paper_name="STViT-L", params_m=94.97, also=("svit_l",)),
    },
    licence="mit",
    doc=8,
)
def stvit(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a STViT; sizes are multiples of 32 pixels."""
    check_side("STViT", img_size)
    return STViT(_SIZES[variant], num_classes)
