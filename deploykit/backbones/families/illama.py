"""iLLaMA: Wang et al., *Adapting LLaMA Decoder to Vision Transformer* (2024).

A causal vision transformer: the class token comes last and sees all patches. Rotary positions
are written with sines and cosines, for complex numbers don't export. How the authors' checkpoints
name their tensors is not known here: only checkpoints of this module's naming load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_tokens
from deploykit.backbones.layers.vit import resized_positions
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["ILlama", "checkpoint_filter_fn", "illama"]

_PATCH = 16
_EPS = 1e-6
_THETA = 1e4

# width, depth, heads
_SIZES = {
    "illama_t": (192, 12, 3),
    "illama_s": (384, 12, 6),
    "illama_b": (768, 12, 12),
    "illama_l": (1024, 24, 16),
}


def rotary_tables(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, width): position times ``theta^(-2i / width)``.

    Su et al., *RoFormer* (2021), eq. 34; neighbouring channels are a pair and share an angle.
    """
    rates = _THETA ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length).float(), rates).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def turned(x: Tensor) -> Tensor:
    """Each pair (a, b) of the last axis as (-b, a): a quarter of a turn."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-second, first), dim=-1).flatten(-2)


class CausalAttention(nn.Module):
    """Attention to what came before; float32 (N, L, C) to (N, L, C).

    The mask multiplies what softmax gives and the rows aren't normalised again, as in the paper's
    soft mask at the end of training.
    """

    cosines: Tensor
    sines: Tensor
    mask: Tensor

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        cosines, sines = rotary_tables(length, dim // heads)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)
        self.register_buffer("mask", torch.ones(length, length).tril(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (t * self.cosines + turned(t) * self.sines for t in (q, k))
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) * self.mask
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` without biases (Shazeer, 2020, eq. 6); (N, L, C) to (N, L, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = math.ceil(2 * 4 * dim / 3 / 256) * 256
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Decoder(nn.Module):
    """``x += attention(RMS x); x += SwiGLU(RMS x)`` on (N, L, C)."""

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=_EPS)
        self.attn = CausalAttention(dim, heads, length)
        self.norm2 = nn.RMSNorm(dim, eps=_EPS)
        self.mlp = SwiGLU(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ILlama(nn.Module):
    """float32 (N, 3, S, S) to (N, classes)."""

    def __init__(self, dim: int, depth: int, heads: int, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.side = img_size // _PATCH
        length = self.side**2 + 1
        self.patch_embed = nn.Conv2d(3, dim, _PATCH, stride=_PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, length, dim) * 0.02)
        self.blocks = nn.Sequential(*(Decoder(dim, heads, length) for _ in range(depth)))
        self.norm = nn.RMSNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = to_tokens(self.patch_embed(x))
        x = torch.cat((x, self.cls_token.expand(x.shape[0], -1, -1)), dim=1)
        x = self.norm(self.blocks(x + self.pos_embed))
        scores: Tensor = self.head(x[:, -1])
        return scores


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict of another image size, its position table resized; the class token is last."""
    assert isinstance(module, ILlama)
    table = resized_positions(state["pos_embed"], module.pos_embed, module.side, 0, 1)
    return {**state, "pos_embed": table}


@register_backbone(
    "iLLaMA",
    {
        "illama_t": Variant(paper_name="iLLaMA-T", params_m=5.70, headline=True),
        "illama_s": Variant(paper_name="iLLaMA-S", params_m=22.02),
        "illama_b": Variant(paper_name="iLLaMA-B", params_m=86.50),
        "illama_l": Variant(paper_name="iLLaMA-L", params_m=310.45),
    },
    doc=148,
)
def illama(variant: str, *, num_classes: int, img_size: int) -> ILlama:
    """iLLaMA of one size; ``img_size`` is a multiple of 16."""
    check_side("iLLaMA", img_size, _PATCH)
    return ILlama(*_SIZES[variant], num_classes, img_size)
