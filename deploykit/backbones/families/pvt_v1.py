"""PVT v1: Wang et al., *Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction
without Convolutions* (ICCV 2021). Not PVT v2, which timm has.

Modules are named as in the official checkpoints. Those are of 224 px; at another size their
position tables are resized when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.vit import resized_positions
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["PyramidVisionTransformer", "checkpoint_filter_fn", "pvt_v1"]

_DIMS, _HEADS, _RATIOS, _REDUCTIONS = (64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), (8, 4, 2, 1)
_DEPTHS = {
    "pvt_v1_tiny": (2, 2, 2, 2),
    "pvt_v1_small": (3, 4, 6, 3),
    "pvt_v1_medium": (3, 4, 18, 3),
    "pvt_v1_large": (3, 8, 27, 3),
}


class SpatialReductionAttention(nn.Module):
    """Attention of all tokens to a map of keys and values R times as small (eq. 1 and 2).

    (N, H·W [+ 1], C) to itself. A class token may only be there where R is 1.
    """

    def __init__(self, dim: int, heads: int, reduction: int, side: int) -> None:
        super().__init__()
        self.heads, self.reduction, self.side = heads, reduction, side
        self.scale = (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.reduction > 1:
            x = self.norm(to_tokens(self.sr(to_map(x, self.side, self.side))))
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """``x += SRA(LN x); x += MLP(LN x)`` on (N, L, C)."""

    def __init__(self, dim: int, heads: int, ratio: int, reduction: int, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = SpatialReductionAttention(dim, heads, reduction, side)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = timm.layers.Mlp(dim, ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Patches of a (N, C, H, W) map as normed tokens (N, H·W / p², D)."""

    def __init__(self, dim: int, out: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, patch, patch)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(to_tokens(self.proj(x)))
        return out


class PyramidVisionTransformer(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes). The class token joins in the last stage."""

    def __init__(self, depths: tuple[int, ...], num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes, self.sides = num_classes, [img_size // 4 // 2**i for i in range(4)]
        stages = zip(_DIMS, _HEADS, _RATIOS, _REDUCTIONS, depths, self.sides, strict=True)
        for i, (dim, heads, ratio, reduction, depth, side) in enumerate(stages, start=1):
            patch, before = (4, 3) if i == 1 else (2, _DIMS[i - 2])
            blocks = [Block(dim, heads, ratio, reduction, side) for _ in range(depth)]
            positions = nn.Parameter(torch.zeros(1, side * side + (i == 4), dim))
            timm.layers.trunc_normal_(positions, std=0.02)
            self.add_module(f"patch_embed{i}", PatchEmbed(before, dim, patch))
            self.register_parameter(f"pos_embed{i}", positions)
            self.add_module(f"block{i}", nn.ModuleList(blocks))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, _DIMS[-1]))
        timm.layers.trunc_normal_(self.cls_token, std=0.02)
        self.norm = nn.LayerNorm(_DIMS[-1], eps=1e-6)
        self.head = nn.Linear(_DIMS[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for i, side in enumerate(self.sides, start=1):
            x = self.get_submodule(f"patch_embed{i}")(x)
            if i == 4:
                x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
            x = x + self.get_parameter(f"pos_embed{i}")
            for block in self.get_submodule(f"block{i}").children():
                x = block(x)
            if i < 4:
                x = to_map(x, side, side)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


def checkpoint_filter_fn(
    state: Mapping[str, Tensor], module: PyramidVisionTransformer
) -> dict[str, Tensor]:
    """An official checkpoint with its position tables at the size of ``module``."""
    wanted = module.state_dict()
    result = dict(state)
    for i, side in enumerate(module.sides, start=1):
        key = f"pos_embed{i}"
        result[key] = resized_positions(state[key], wanted[key], side, int(i == 4), 0)
    return result


@register_backbone(
    "PVT v1",
    {
        "pvt_v1_tiny": Variant(paper_name="PVT-Tiny", params_m=13.23, also=("pvt_t",)),
        "pvt_v1_small": Variant(
            paper_name="PVT-Small", params_m=24.49, also=("pvt_s", "pvt"), headline=True
        ),
        "pvt_v1_medium": Variant(paper_name="PVT-Medium", params_m=44.21, also=("pvt_m",)),
        "pvt_v1_large": Variant(paper_name="PVT-Large", params_m=61.37, also=("pvt_l",)),
    },
    licence="apache-2.0",
    doc=172,
)
def pvt_v1(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a PVT v1; sizes are multiples of 32 pixels."""
    check_side("PVT v1", img_size)
    return PyramidVisionTransformer(_DEPTHS[variant], num_classes, img_size)
