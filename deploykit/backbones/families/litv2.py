"""LITv2: Pan et al., *Fast Vision Transformers with HiLo Attention* (NeurIPS 2022).

No attention in the first two stages; in the others some heads attend inside 2 x 2 windows (high
frequencies) and the rest to a pooled map (low frequencies). Attention and MLPs are named as in the
official checkpoints. How those name the deformable down-sampling isn't established, so official
checkpoints are not converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit.backbones.layers.deformable import DeformablePatches
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["HiLo", "LITv2", "litv2"]

_ALPHA = 0.9  # share of the heads that see low frequencies
_WINDOWS = (0, 0, 2, 1)  # of HiLo in each stage; 0 has no attention, 1 is ordinary attention


@dataclass(frozen=True)
class _Size:
    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]


_SIZES = {
    "litv2_s": _Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "litv2_m": _Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "litv2_b": _Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
}


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    out: Tensor = scores.softmax(-1) @ v
    return out


class HiLo(nn.Module):
    """High-frequency heads in windows beside low-frequency heads over pooled keys (fig. 3).

    Tokens (N, H·W, C) to themselves; ``side`` is H = W, a multiple of ``window``. With window 1 a
    token is its own window and its own mean, so every head is a low one: ordinary attention.
    """

    def __init__(self, dim: int, heads: int, window: int, side: int) -> None:
        super().__init__()
        head = dim // heads
        low = heads if window == 1 else int(heads * _ALPHA)
        self.window, self.side, self.head = window, side, head
        self.low_heads, self.high_heads = low, heads - low
        low_dim, high_dim = low * head, (heads - low) * head
        if high_dim:
            self.h_qkv = nn.Linear(dim, 3 * high_dim)
            self.h_proj = nn.Linear(high_dim, high_dim)
        self.l_q = nn.Linear(dim, low_dim)
        self.l_kv = nn.Linear(dim, 2 * low_dim)
        self.l_proj = nn.Linear(low_dim, low_dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.high_heads:
            return self._low(x)
        return torch.cat((self._high(x), self._low(x)), dim=-1)

    def _high(self, x: Tensor) -> Tensor:
        s, n = self.window, self.side // self.window
        qkv = self.h_qkv(x).reshape(-1, n, s, n, s, 3, self.high_heads, self.head)
        # (3, N, windows down, windows across, heads, tokens of a window, head width)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3).unbind(0)
        y = _attend(q, k, v).unflatten(0, (-1, n, n)).unflatten(4, (s, s))
        y = y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(1, 4)
        out: Tensor = self.h_proj(y)
        return out

    def _low(self, x: Tensor) -> Tensor:
        q = self.l_q(x).unflatten(-1, (self.low_heads, -1)).transpose(1, 2)
        if self.window > 1:
            x = to_tokens(F.avg_pool2d(to_map(x, self.side, self.side), self.window))
        k, v = self.l_kv(x).unflatten(-1, (2, self.low_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.l_proj(_attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class _DepthwiseConv(nn.Module):
    """A depthwise convolution one level deeper, as PVT v2 and LITv2 name it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dwconv(x)
        return out


class DepthwiseMlp(nn.Module):
    """Linear to 4C, DW3 on the map, GELU, linear; (N, H·W, C) to itself."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.dwconv = _DepthwiseConv(4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = to_map(self.fc1(x), self.side, self.side)
        out: Tensor = self.fc2(F.gelu(to_tokens(self.dwconv(x))))
        return out


class Block(nn.Module):
    """``x += HiLo(LN x)`` where the stage has attention, ``x += MLP(LN x)``; (N, L, C)."""

    def __init__(self, dim: int, heads: int, window: int, side: int) -> None:
        super().__init__()
        self.has_attention = window > 0
        if self.has_attention:
            self.norm1 = nn.LayerNorm(dim)
            self.attn = HiLo(dim, heads, window, side)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = DepthwiseMlp(dim, side)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_attention:
            x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class DeformableMerging(nn.Module):
    """Deformable 2 x 2 convolution of stride 2, BN, GELU: (N, L, C) to (N, L/4, 2C)."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.merge = DeformablePatches(dim, 2 * dim, (side, side))
        self.norm = nn.BatchNorm2d(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.merge(to_map(x, self.side, self.side)))
        return to_tokens(F.gelu(x))


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels as normed tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, 4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(to_tokens(self.proj(x)))
        return out


class Stage(nn.Module):
    """Blocks, then (but for the last stage) down-sampling."""

    def __init__(self, dim: int, depth: int, heads: int, window: int, side: int, *, last: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, window, side) for _ in range(depth))
        self.downsample = nn.Identity() if last else DeformableMerging(dim, side)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.downsample(x)
        return out


class LITv2(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes)."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.patch_embed = PatchEmbed(size.dim)
        stages = zip(size.depths, size.heads, _WINDOWS, strict=True)
        self.layers = nn.ModuleList(
            Stage(size.dim * 2**i, depth, heads, window, img_size // 4 // 2**i, last=i == 3)
            for i, (depth, heads, window) in enumerate(stages)
        )
        self.norm = nn.LayerNorm(8 * size.dim)
        self.head = nn.Linear(8 * size.dim, num_classes)
        self.apply(draw_weights)
        for module in self.modules():
            if isinstance(module, DeformablePatches):
                module.reset_offsets()

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@register_backbone(
    "LITv2",
    {
        "litv2_s": Variant(paper_name="LITv2-S", params_m=27.84, headline=True),
        "litv2_m": Variant(paper_name="LITv2-M", params_m=48.83),
        "litv2_b": Variant(paper_name="LITv2-B", params_m=86.52),
    },
    licence="apache-2.0",
    doc=53,
)
def litv2(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a LITv2; sizes are multiples of 32 pixels."""
    check_side("LITv2", img_size)
    return LITv2(_SIZES[variant], num_classes, img_size)
