"""What is special about the networks of ``declined.py``, as modules, and what they are timed with.

Sizes are those of a small network at 224 pixels; where a network's own aren't known, a part is
the least that its paper's description needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.families.meta_spikeformer import TransformerBlock as SpikeBlock
from deploykit.backbones.families.nat import NeighborhoodAttention
from deploykit.backbones.families.vmamba import SS2D
from deploykit.backbones.layers.vit import SelfAttention, TransformerBlock

__all__ = ["PARTS", "Clip", "FiveChannels", "Part"]

Built = Callable[[], tuple[nn.Module, Tensor]]
_TOKENS, _DIM, _HEADS = 197, 192, 3


def block() -> tuple[nn.Module, Tensor]:
    """One block of DeiT-T."""
    return TransformerBlock(_DIM, _HEADS), torch.randn(1, _TOKENS, _DIM)


@dataclass(frozen=True)
class Part:
    """A part and something ordinary, each with an input."""

    what: str
    build: Built
    against: Built = block
    against_what: str = "a block of DeiT-T"


class Clip(nn.Module):
    """A classifier of clips: its patches are of two frames; (N, 3, T, S, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, 8, (2, 16, 16), (2, 16, 16))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.patches(x).mean((2, 3, 4)))
        return out


class FiveChannels(nn.Module):
    """A classifier of images of five channels, (N, 5, S, S): a token for each channel's patch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 16, 16)
        self.channel = nn.Parameter(torch.zeros(1, 5, 1, 8))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x.reshape(-1, 1, *x.shape[2:])).flatten(2).transpose(1, 2)
        tokens = tokens.unflatten(0, (-1, 5)) + self.channel
        out: Tensor = self.head(tokens.flatten(1, 2).mean(1))
        return out


class LocalScan(nn.Module):
    """Neighbourhood attention(s), then a scan in four directions; (N, C, S, S)."""

    def __init__(self, dim: int, side: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.local = nn.ModuleList(NeighborhoodAttention(dim, 2, side, d) for d in dilations)
        self.scan = SS2D(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.local:
            x = x + layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        out: Tensor = x + self.scan(x)
        return out


class DeformableAttention(nn.Module):
    """Each token of three maps samples 4 places of each map a head (Zhu et al. 2021, eq. 3).

    (N, L, C) to the same, L = 28² + 14² + 7².
    """

    sides = (28, 14, 7)
    home: Tensor

    def __init__(self, dim: int, heads: int = 6, points: int = 4) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        self.offsets = nn.Linear(dim, heads * len(self.sides) * points * 2)
        self.weights = nn.Linear(dim, heads * len(self.sides) * points)
        self.value, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        grids = []
        for side in self.sides:
            axis = (2 * torch.arange(side) + 1) / side - 1
            grids.append(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1))
        self.register_buffer("home", torch.cat(grids), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        levels = len(self.sides)
        offsets = self.offsets(x).unflatten(2, (self.heads, levels, self.points, 2))
        weights = self.weights(x).unflatten(2, (self.heads, -1)).softmax(-1)
        weights = weights.unflatten(3, (levels, self.points)).transpose(1, 2)
        value = self.value(x).unflatten(2, (self.heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        out = torch.zeros((), dtype=x.dtype)
        for level, (side, part) in enumerate(
            zip(self.sides, value.split([s * s for s in self.sides], dim=2), strict=True)
        ):
            where = self.home[:, None, None] + offsets[:, :, :, level] * (2 / side)
            where = where.transpose(1, 2).flatten(0, 1)  # (N heads, L, points, 2)
            seen = F.grid_sample(part.unflatten(2, (side, side)), where, align_corners=False)
            out = out + (seen * weights[:, :, :, level].flatten(0, 1).unsqueeze(1)).sum(-1)
        mixed = out.unflatten(0, (-1, self.heads)).flatten(1, 2).transpose(1, 2)
        y: Tensor = self.proj(mixed)
        return y


class RegionSampling(nn.Module):
    """49 tokens, each with a region of its own, sample 36 points of it and mix them by weights that
    they make: features (N, C, 56, 56) to (N, 49, C). Once; the network does so again and again.
    """

    home: Tensor

    def __init__(self, dim: int, tokens: int = 49, points: int = 36) -> None:
        super().__init__()
        self.points, self.dim = points, dim
        self.tokens = nn.Parameter(0.02 * torch.randn(1, tokens, dim))
        self.region = nn.Linear(dim, 4)
        self.offsets = nn.Linear(dim, 2 * points)
        self.mixing = nn.Linear(dim, dim * dim)
        self.out = nn.Linear(points * dim, dim)
        self.register_buffer("home", torch.rand(1, tokens, 2) * 2 - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens + x.mean((2, 3)).unsqueeze(1)
        centre, size = self.region(tokens).split(2, dim=-1)
        offsets = self.offsets(tokens).unflatten(2, (self.points, 2))
        where = (self.home + centre).unsqueeze(2) + size.exp().unsqueeze(2) * offsets
        seen = F.grid_sample(x, where, align_corners=False).permute(0, 2, 3, 1)
        mixed = F.gelu(seen @ self.mixing(tokens).unflatten(2, (self.dim, self.dim)))
        out: Tensor = tokens + self.out(mixed.flatten(2))
        return out


class AttentionConv(nn.Module):
    """Attention of each pixel to its 7x7 window by unfold, as a convolution; (N, C, S, S)."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        q = q.flatten(2).unflatten(1, (self.heads, -1)).permute(0, 1, 3, 2).unsqueeze(3)
        k, v = (
            F.unfold(t, 7, padding=3).unflatten(1, (self.heads, -1, 49)).permute(0, 1, 4, 3, 2)
            for t in (k, v)
        )  # (N, heads, L, 49, d)
        seen = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = seen.squeeze(3).transpose(2, 3).flatten(1, 2).unflatten(2, (self.side, self.side))
        out: Tensor = self.proj(y)
        return out


class Monarch(nn.Module):
    """A linear layer as two block-diagonal products, permuted between (Dao et al. 2022)."""

    def __init__(self, dim: int, out: int, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(blocks, dim // blocks, dim // blocks) * 0.02)
        self.second = nn.Parameter(torch.randn(blocks, dim // blocks, out // blocks) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.first.shape[0]
        y = (x.unflatten(2, (blocks, 1, -1)) @ self.first).squeeze(3)  # (N, L, blocks, d)
        y = y.transpose(2, 3).flatten(2).unflatten(2, (blocks, 1, -1))
        out: Tensor = (y @ self.second).squeeze(3).transpose(2, 3).flatten(2)
        return out


class MonarchMlp(nn.Module):
    """The MLP of ViT-B with Monarch matrices; (N, L, 768) to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = Monarch(768, 3072), Monarch(3072, 768)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class ReluAttention(SelfAttention):
    """Attention with ``ReLU(scores) / L`` for softmax; (N, L, C) to itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).relu() / q.shape[-2]
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out


def _dense_mlp() -> tuple[nn.Module, Tensor]:
    dense = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768))
    return dense, torch.randn(1, _TOKENS, 768)


PARTS = {
    "local_scan": Part(
        "7x7 neighbourhood attention and a scan of 56x56 places, 64 channels",
        lambda: (LocalScan(64, 56, (1,)), torch.randn(1, 64, 56, 56)),
    ),
    "attended_scan": Part(
        "two 7x7 neighbourhood attentions, one of dilation 8, and a scan of 56x56 places, 64 "
        "channels (without the attention to the scan's states)",
        lambda: (LocalScan(64, 56, (1, 8)), torch.randn(1, 64, 56, 56)),
    ),
    "deformable": Part(
        "deformable attention over maps of 28, 14 and 7 places a side, 192 channels",
        lambda: (DeformableAttention(_DIM), torch.randn(1, 1029, _DIM)),
        lambda: (SelfAttention(_DIM, 6), torch.randn(1, 1029, _DIM)),
        "ordinary attention over the same tokens",
    ),
    "sampling": Part(
        "49 tokens' sampling of 36 points each, 64 channels, and its mixing, once",
        lambda: (RegionSampling(64), torch.randn(1, 64, 56, 56)),
    ),
    "attention_conv": Part(
        "7x7 attention as a convolution at 14x14 places, 192 channels",
        lambda: (AttentionConv(_DIM, _HEADS, 14), torch.randn(1, _DIM, 14, 14)),
        lambda: (SelfAttention(_DIM, _HEADS), torch.randn(1, 196, _DIM)),
        "ordinary attention over the same tokens, each seeing all",
    ),
    "monarch": Part(
        "the MLP of ViT-B with Monarch matrices of 4 blocks",
        lambda: (MonarchMlp(), torch.randn(1, _TOKENS, 768)),
        _dense_mlp,
        "the same MLP, dense",
    ),
    "relu_attention": Part(
        "attention of DeiT-T with ReLU for softmax",
        lambda: (ReluAttention(_DIM, _HEADS), torch.randn(1, _TOKENS, _DIM)),
        lambda: (SelfAttention(_DIM, _HEADS), torch.randn(1, _TOKENS, _DIM)),
        "the same with softmax",
    ),
    "spikes": Part(
        "a spiking block of 256 channels at 14x14 places, four steps",
        lambda: (SpikeBlock(256), torch.randn(4, 1, 256, 14, 14)),
        lambda: (SpikeBlock(256), torch.randn(1, 1, 256, 14, 14)),
        "one step of it",
    ),
}
