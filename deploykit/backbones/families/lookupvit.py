"""LookupViT, after the paper: Koner et al., *LookupViT: Compressing visual information to a limited
number of tokens* (ECCV 2024).

Most of the work is done on M × M compressed tokens, which look up what they need in the N tokens of
the image and write back to them. No official code is public. Taken from the paper's description:
both directions of the cross-attention share one attention matrix, and the image's tokens get an
MLP half as wide as they are. Chosen here: the widths of ViT-S and ViT-B, LayerNorm before each
part, and the mean of the compressed tokens under the head. One set of weights serves every M, so
the variants of one size load each other's checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.vit import TransformerBlock, resized_positions
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["LookupViT", "checkpoint_filter_fn", "lookupvit"]

_PATCH = 16
_EPS = 1e-6
_LIGHT = 0.5  # width of the image tokens' MLP against theirs

# width, depth, heads
_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12)}


class BidirectionalAttention(nn.Module):
    """Compressed tokens read from the image's tokens, and later write to them.

    ``read``: ``A = softmax(q k^T / sqrt(d))``, ``A v``. ``write``: the same scores transposed,
    softmax over the compressed tokens. compressed: (N, M², C); image: (N, L, C).
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.back_v = nn.Linear(dim, dim)
        self.back_proj = nn.Linear(dim, dim)

    def read(self, compressed: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the compressed tokens read, and the scores (N, heads, M², L)."""
        q = self.q(compressed).unflatten(-1, (self.heads, -1)).transpose(1, 2) * self.scale
        k, v = self.kv(image).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1)
        out: Tensor = self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out, scores

    def write(self, compressed: Tensor, scores: Tensor) -> Tensor:
        """What the image's tokens take from the compressed ones: (N, L, C)."""
        v = self.back_v(compressed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attention = scores.transpose(-2, -1).softmax(-1)
        out: Tensor = self.back_proj((attention @ v).transpose(1, 2).flatten(2))
        return out


class LookupBlock(nn.Module):
    """Read, think (attention and MLP on the compressed tokens), write, light MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_compressed = nn.LayerNorm(dim, eps=_EPS)
        self.norm_image = nn.LayerNorm(dim, eps=_EPS)
        self.lookup = BidirectionalAttention(dim, heads)
        self.think = TransformerBlock(dim, heads)
        self.norm_back = nn.LayerNorm(dim, eps=_EPS)
        self.norm_mlp = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = timm.layers.Mlp(dim, int(_LIGHT * dim))

    def forward(self, compressed: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        read, scores = self.lookup.read(self.norm_compressed(compressed), self.norm_image(image))
        compressed = self.think(compressed + read)
        image = image + self.lookup.write(self.norm_back(compressed), scores)
        image = image + self.mlp(self.norm_mlp(image))
        return compressed, image


class LookupViT(nn.Module):
    """float32 (N, 3, S, S) to (N, classes), with ``lookups``² compressed tokens."""

    def __init__(
        self, dim: int, depth: int, heads: int, lookups: int, num_classes: int, img_size: int
    ) -> None:
        super().__init__()
        self.side, self.lookups = img_size // _PATCH, lookups
        self.patch_embed = nn.Conv2d(3, dim, _PATCH, stride=_PATCH)
        self.pos_embed = nn.Parameter(torch.randn(1, self.side**2, dim) * 0.02)
        self.blocks = nn.ModuleList(LookupBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        image = to_tokens(self.patch_embed(x)) + self.pos_embed
        grid = to_map(image, self.side, self.side)
        small = F.interpolate(
            grid, (self.lookups, self.lookups), mode="bilinear", align_corners=False
        )
        compressed = to_tokens(small)
        for block in self.blocks:
            compressed, image = block(compressed, image)
        scores: Tensor = self.head(self.norm(compressed).mean(1))
        return scores


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict of another image size, its position table resized to the module's."""
    assert isinstance(module, LookupViT)
    table = resized_positions(state["pos_embed"], module.pos_embed, module.side, 0, 0)
    return {**state, "pos_embed": table}


@register_backbone(
    "LookupViT",
    {
        f"lookupvit_{size}_{lookups}": Variant(
            params_m={"s": 34.51, "b": 136.25}[size],  # of this build; the paper gives none
            paper_name=f"LookupViT-{size.upper()} {lookups}x{lookups} (after the paper)",
            headline=(size, lookups) == ("s", 5),
        )
        for size in ("s", "b")
        for lookups in (3, 5, 7, 10)
    },
    doc=243,
)
def lookupvit(variant: str, *, num_classes: int, img_size: int) -> LookupViT:
    """LookupViT of one size and number of compressed tokens; ``img_size`` a multiple of 16."""
    check_side("LookupViT", img_size, _PATCH)
    _, size, lookups = variant.split("_")
    return LookupViT(*_SIZES[size], int(lookups), num_classes, img_size)
