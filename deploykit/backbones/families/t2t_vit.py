"""T2T-ViT: Yuan et al., *Tokens-to-Token ViT: Training Vision Transformers from Scratch on
ImageNet* (ICCV 2021).

Modules are named as in the official checkpoints, which load as they are; at another image size
their position table is resized. Two tokenisers: with the Performer's linear attention
(Choromanski et al., ICLR 2021), and with softmax attention (the ``t2t_vit_t_*`` versions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["T2TViT", "checkpoint_filter_fn", "t2t_vit"]

_TOKEN_DIM = 64
# width, depth, heads, ratio of the MLP
_SIZES = {
    7: (256, 7, 4, 2),
    10: (256, 10, 4, 2),
    12: (256, 12, 4, 2),
    14: (384, 14, 6, 3),
    19: (448, 19, 7, 3),
    24: (512, 24, 8, 3),
}


class TokenPerformer(nn.Module):
    """Attention by positive random features, and an MLP: (N, T, C) to (N, T, 64).

    ``exp(q·k)`` is ``E[phi(q) phi(k)]`` with ``phi(x) = exp(W x - |x|²/2) / sqrt(m)`` for m
    orthogonal random rows of W, which are stored, not trained (Performer, eq. 5). Products are
    taken from the right: T² never appears.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        features = out // 2
        self.kqv = nn.Linear(dim, 3 * out)
        self.proj = nn.Linear(out, out)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(out)
        self.mlp = nn.Sequential(nn.Linear(out, out), nn.GELU(), nn.Linear(out, out))
        rows = torch.randn(features, out)
        if rows.device.type != "meta":  # a shape has no orthogonal rows
            nn.init.orthogonal_(rows)
        self.w = nn.Parameter(rows * math.sqrt(features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self._features(k), self._features(q)
        norm = q @ k.sum(1, keepdim=True).transpose(1, 2)
        y = q @ (k.transpose(1, 2) @ v) / (norm + 1e-8)
        x = v + self.proj(y)
        x = x + self.mlp(self.norm2(x))
        return x

    def _features(self, x: Tensor) -> Tensor:
        half_square = (x * x).sum(-1, keepdim=True) / 2
        return torch.exp(x @ self.w.transpose(0, 1) - half_square) / math.sqrt(len(self.w))


class _WideAttention(nn.Module):
    """One-head attention that changes the width; the skip carries the values."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.qkv = nn.Linear(dim, 3 * out, bias=False)
        self.proj = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attention = (q * self.scale @ k.transpose(1, 2)).softmax(-1)
        y: Tensor = v + self.proj(attention @ v)
        return y


class TokenTransformer(nn.Module):
    """Softmax attention and an MLP: (N, T, C) to (N, T, 64)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _WideAttention(dim, out)
        self.norm2 = nn.LayerNorm(out)
        self.mlp = timm.layers.Mlp(out, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class TokensToToken(nn.Module):
    """Overlapping patches unfolded, mixed, and unfolded again: (N, 3, S, S) to (N, (S/16)², C)."""

    def __init__(self, width: int, side: int, *, performer: bool) -> None:
        super().__init__()
        self.side = side
        block = TokenPerformer if performer else TokenTransformer
        self.soft_split0 = nn.Unfold(7, stride=4, padding=2)
        self.soft_split1 = nn.Unfold(3, stride=2, padding=1)
        self.soft_split2 = nn.Unfold(3, stride=2, padding=1)
        self.attention1 = block(3 * 7 * 7, _TOKEN_DIM)
        self.attention2 = block(_TOKEN_DIM * 3 * 3, _TOKEN_DIM)
        self.project = nn.Linear(_TOKEN_DIM * 3 * 3, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention1(self.soft_split0(x).transpose(1, 2))
        x = x.transpose(1, 2).unflatten(2, (4 * self.side, 4 * self.side))
        x = self.attention2(self.soft_split1(x).transpose(1, 2))
        x = x.transpose(1, 2).unflatten(2, (2 * self.side, 2 * self.side))
        x = self.project(self.soft_split2(x).transpose(1, 2))
        return x


class Attention(nn.Module):
    """Multi-head self-attention: (N, T, C) to the same.

    Scores are scaled by C^-0.5, not by the head's width: so the released weights were trained.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split[0], split[1], split[2]
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        y: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return y


class Block(nn.Module):
    """``x += attention(LN x); x += MLP(LN x)`` on (N, T, C)."""

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class T2TViT(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); (S / 16)² tokens and a class token."""

    def __init__(
        self,
        size: tuple[int, int, int, int],
        num_classes: int,
        img_size: int,
        *,
        performer: bool,
    ) -> None:
        super().__init__()
        width, depth, heads, ratio = size
        side = img_size // 16
        self.tokens_to_token = TokensToToken(width, side, performer=performer)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        table = _sinusoid(side * side + 1, width)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.Sequential(*(Block(width, heads, ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        timm.layers.trunc_normal_(self.cls_token, std=0.02)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        scores: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return scores


def _sinusoid(positions: int, width: int) -> Tensor:
    """The fixed table of Vaswani et al. (2017), section 3.5: (1, positions, width)."""
    column = torch.arange(width)
    rate = torch.pow(10000.0, -(column // 2 * 2).double() / width)
    angle = torch.outer(torch.arange(positions).double(), rate)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of another image size, its position table resized (bicubic)."""
    assert isinstance(module, T2TViT)
    side = math.isqrt(module.pos_embed.shape[1] - 1)
    table = timm.layers.resample_abs_pos_embed(state["pos_embed"], [side, side])
    return {**state, "pos_embed": table}


def _variant(name: str, params_m: float, *, headline: bool = False) -> Variant:
    return Variant(paper_name=name, params_m=params_m, crop_pct=0.9, headline=headline)


@register_backbone(
    "T2T-ViT",
    {
        "t2t_vit_7": _variant("T2T-ViT-7", 4.31),
        "t2t_vit_10": _variant("T2T-ViT-10", 5.89),
        "t2t_vit_12": _variant("T2T-ViT-12", 6.94),
        "t2t_vit_14": _variant("T2T-ViT-14", 21.55, headline=True),
        "t2t_vit_19": _variant("T2T-ViT-19", 39.18),
        "t2t_vit_24": _variant("T2T-ViT-24", 64.11),
        "t2t_vit_t_14": _variant("T2T-ViT_t-14", 21.54),
        "t2t_vit_t_19": _variant("T2T-ViT_t-19", 39.17),
        "t2t_vit_t_24": _variant("T2T-ViT_t-24", 64.10),
    },
    licence="bsd-3-clause-clear",
    doc=152,
)
def t2t_vit(variant: str, *, num_classes: int, img_size: int) -> T2TViT:
    """T2T-ViT of one size; ``img_size`` is a multiple of 16.

    The fixed position table is computed for the size at hand, as the official code does.
    """
    check_side("T2T-ViT", img_size, 16)
    size = _SIZES[int(variant.rsplit("_", 1)[1])]
    return T2TViT(size, num_classes, img_size, performer="_t_" not in variant)
