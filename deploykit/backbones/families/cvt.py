"""CvT: Wu et al., *CvT: Introducing Convolutions to Vision Transformers* (ICCV 2021).

Modules are named as in the official checkpoints, which load as they are at any size: there are
no position embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["ConvolutionalVisionTransformer", "cvt"]


@dataclass(frozen=True)
class _Size:
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]


_SIZES = {
    "cvt_13": _Size((64, 192, 384), (1, 2, 10), (1, 3, 6)),
    "cvt_21": _Size((64, 192, 384), (1, 4, 16), (1, 3, 6)),
    "cvt_w24": _Size((192, 768, 1024), (2, 2, 20), (3, 12, 16)),
}


class ConvProjection(nn.Module):
    """``BN(DW3(x))`` of a (N, C, H, W) map as tokens (N, H·W / s², C) (eq. 2)."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.bn(self.conv(x)))


class ConvAttention(nn.Module):
    """Attention over convolutional projections; keys and values have half the map's sides.

    (N, [1 +] H·W, C) to itself; the class token, where there is one, bypasses the convolutions.
    """

    def __init__(self, dim: int, heads: int, has_class_token: bool, side: int) -> None:
        super().__init__()
        self.heads, self.before, self.side = heads, int(has_class_token), side
        self.scale = dim**-0.5  # of the whole width, as the official code has it
        self.conv_proj_q = ConvProjection(dim, 1)
        self.conv_proj_k = ConvProjection(dim, 2)
        self.conv_proj_v = ConvProjection(dim, 2)
        self.proj_q = nn.Linear(dim, dim)
        self.proj_k = nn.Linear(dim, dim)
        self.proj_v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        first, image = x[:, : self.before], to_map(x[:, self.before :], self.side, self.side)
        q = self._heads(self.proj_q, self.conv_proj_q(image), first)
        k = self._heads(self.proj_k, self.conv_proj_k(image), first)
        v = self._heads(self.proj_v, self.conv_proj_v(image), first)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out

    def _heads(self, project: nn.Linear, tokens: Tensor, first: Tensor) -> Tensor:
        if self.before:
            tokens = torch.cat((first, tokens), dim=1)
        out: Tensor = project(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return out


class Block(nn.Module):
    """``x += attention(LN x); x += MLP(LN x)`` on (N, L, C)."""

    def __init__(self, dim: int, heads: int, has_class_token: bool, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = ConvAttention(dim, heads, has_class_token, side)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ConvEmbed(nn.Module):
    """Overlapping patches of a (N, C, H, W) map as normed tokens (eq. 1)."""

    def __init__(self, dim: int, out: int, first: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 7, 4, 2) if first else nn.Conv2d(dim, out, 3, 2, 1)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(to_tokens(self.proj(x)))
        return out


class Stage(nn.Module):
    """Embedding and blocks: a (N, C, H, W) map to tokens (N, [1 +] H'·W', D)."""

    def __init__(self, before: int, dim: int, depth: int, heads: int, index: int, side: int):
        super().__init__()
        last = index == 2
        self.patch_embed = ConvEmbed(before, dim, first=index == 0)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if last else None
        if self.cls_token is not None:
            timm.layers.trunc_normal_(self.cls_token, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, heads, last, side) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return x


class ConvolutionalVisionTransformer(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes), which the class token of the last stage tells."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes, self.sides = num_classes, [img_size // 4 // 2**i for i in range(3)]
        befores = (3, *size.dims)
        stages = zip(befores, size.dims, size.depths, size.heads, strict=False)
        for i, (before, dim, depth, heads) in enumerate(stages):
            stage = Stage(before, dim, depth, heads, i, self.sides[i])
            self.add_module(f"stage{i}", stage)
        self.norm = nn.LayerNorm(size.dims[-1])
        self.head = nn.Linear(size.dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for i, side in enumerate(self.sides):
            x = self.get_submodule(f"stage{i}")(x)
            if i < 2:
                x = to_map(x, side, side)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


@register_backbone(
    "CvT",
    {
        "cvt_13": Variant(paper_name="CvT-13", params_m=20.00, headline=True),
        "cvt_21": Variant(paper_name="CvT-21", params_m=31.62),
        "cvt_w24": Variant(paper_name="CvT-W24", params_m=277.0, input=384, crop_pct=1.0),
    },
    licence="mit",
    doc=97,
)
def cvt(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a CvT; sizes are multiples of 32 pixels."""
    check_side("CvT", img_size)
    return ConvolutionalVisionTransformer(_SIZES[variant], num_classes, img_size)
