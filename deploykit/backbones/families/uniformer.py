"""UniFormer (image): Li et al., *UniFormer: Unifying Convolution and Self-attention for Visual
Recognition* (TPAMI 2023).

Convolutions mix neighbours in the first two stages, attention mixes all tokens in the last two.
Modules are named as in the official checkpoints, which load as they are at any size: there are
no position tables. UniFormer-L's have an auxiliary head beside, for token labelling, which isn't
built here: they are refused. The light versions (XXS, XS) are in ``uniformer_light.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.vit import SelfAttention
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["ConvEmbed", "LocalBlock", "PatchEmbed", "UniFormer", "uniformer"]


@dataclass(frozen=True)
class _Size:
    depths: tuple[int, ...]
    dims: tuple[int, ...] = (64, 128, 320, 512)
    head: int = 64
    has_conv_stem: bool = False
    has_layer_scale: bool = False


_SIZES = {
    "uniformer_s": _Size((3, 4, 8, 3)),
    "uniformer_s_plus": _Size((3, 5, 9, 3), head=32, has_conv_stem=True),
    "uniformer_s_plus_dim64": _Size((3, 5, 9, 3), has_conv_stem=True),
    "uniformer_b": _Size((5, 8, 20, 7)),
    "uniformer_b_ls": _Size((5, 8, 20, 7), has_layer_scale=True),
    "uniformer_l": _Size((5, 10, 24, 7), dims=(128, 192, 448, 640), has_layer_scale=True),
}


class LocalBlock(nn.Module):
    """``x += DW3(x); x += PW(DW5(PW(BN x))); x += MLP(BN x)`` on (N, C, H, W) (eq. 2 to 4)."""

    def __init__(self, dim: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = timm.layers.ConvMlp(dim, mlp_ratio * dim, act_layer=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed(x)
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class GlobalBlock(nn.Module):
    """``x += DW3(x); x += MHA(LN x); x += MLP(LN x)`` on (N, C, H, W) (eq. 5 and 6)."""

    def __init__(self, dim: int, heads: int, side: int, *, has_layer_scale: bool) -> None:
        super().__init__()
        self.side = side
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)
        self.has_layer_scale = has_layer_scale
        if has_layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-6))
            self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        x = to_tokens(x + self.pos_embed(x))
        y = self.attn(self.norm1(x))
        x = x + (self.gamma_1 * y if self.has_layer_scale else y)
        y = self.mlp(self.norm2(x))
        x = x + (self.gamma_2 * y if self.has_layer_scale else y)
        return to_map(x, self.side, self.side)


class PatchEmbed(nn.Module):
    """Patches of a (N, C, H, W) map, normed over channels: (N, D, H/p, W/p)."""

    def __init__(self, dim: int, out: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, patch, patch)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x.permute(0, 3, 1, 2)


class ConvEmbed(nn.Module):
    """Overlapping patches: 3 x 3 convolutions of stride 2 with BatchNorm, two of them at first."""

    def __init__(self, dim: int, out: int, *, first: bool) -> None:
        super().__init__()
        half = out // 2
        layers = [nn.Conv2d(dim, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU()] if first else []
        last = nn.Conv2d(half if first else dim, out, 3, 2, 1)
        self.proj = nn.Sequential(*layers, last, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x)
        return out


class UniFormer(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes)."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        befores = (3, *size.dims)
        for i, (before, dim, depth) in enumerate(
            zip(befores, size.dims, size.depths, strict=False), start=1
        ):
            if size.has_conv_stem:
                embed: nn.Module = ConvEmbed(before, dim, first=i == 1)
            else:
                embed = PatchEmbed(before, dim, 4 if i == 1 else 2)
            self.add_module(f"patch_embed{i}", embed)
            side = img_size // 2 ** (i + 1)
            scaled = size.has_layer_scale
            blocks = [
                LocalBlock(dim)
                if i <= 2
                else GlobalBlock(dim, dim // size.head, side, has_layer_scale=scaled)
                for _ in range(depth)
            ]
            self.add_module(f"blocks{i}", nn.ModuleList(blocks))
        self.norm = nn.BatchNorm2d(size.dims[-1])
        self.head = nn.Linear(size.dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            x = self.get_submodule(f"patch_embed{i}")(x)
            for block in self.get_submodule(f"blocks{i}").children():
                x = block(x)
        logits: Tensor = self.head(self.norm(x).mean((2, 3)))
        return logits


@register_backbone(
    "UniFormer",
    {
        "uniformer_s": Variant(paper_name="UniFormer-S", params_m=21.55, headline=True),
        "uniformer_s_plus": Variant(paper_name="UniFormer-S plus", params_m=24.03),
        "uniformer_s_plus_dim64": Variant(
            paper_name="UniFormer-S plus, heads of 64", params_m=24.03
        ),
        "uniformer_b": Variant(paper_name="UniFormer-B", params_m=49.78),
        "uniformer_b_ls": Variant(paper_name="UniFormer-B with layer scale", params_m=49.80),
        "uniformer_l": Variant(
            # the paper's 100 M have an auxiliary head of 0.64 M for token labelling
            paper_name="UniFormer-L",
            params_m=99.46,
            also=("uniformer_l_ls",),
        ),
    },
    licence="apache-2.0",
    doc=1,
)
def uniformer(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a UniFormer; sizes are multiples of 32 pixels."""
    check_side("UniFormer", img_size)
    return UniFormer(_SIZES[variant], num_classes, img_size)
