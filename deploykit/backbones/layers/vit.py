"""The plain transformer block, attention in products that can be quantised, position tables.

Dosovitskiy et al., *An Image is Worth 16x16 Words* (ICLR 2021), eq. 1 to 4. Names as in timm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit._compat import timm

__all__ = ["SelfAttention", "TransformerBlock", "resized_positions"]


class SelfAttention(nn.Module):
    """``softmax(q k^T / sqrt(d)) v`` per head, then a linear layer; float32 (N, L, C) to itself."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out


class TransformerBlock(nn.Module):
    """``x += attention(LN x); x += MLP(LN x)`` on float32 (N, L, C)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = timm.layers.Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


def resized_positions(table: Tensor, wanted: Tensor, side: int, before: int, after: int) -> Tensor:
    """A position table (1, L, C) resized to the shape of ``wanted``, whose map is ``side`` square.

    ``before`` and ``after`` are how many tokens stand before and after the map's; they are kept.
    Bicubic, as papers do when they tune at another size.
    """
    if table.shape == wanted.shape:
        return table
    last = table.shape[1] - after
    resized: Tensor = timm.layers.resample_abs_pos_embed(
        table[:, :last], [side, side], num_prefix_tokens=before, antialias=False
    )
    return torch.cat((resized, table[:, last:]), dim=1)
