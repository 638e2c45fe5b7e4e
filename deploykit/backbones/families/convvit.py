"""ConvViT: the encoder of ConvMAE and MR-MAE, two convolutional stages and a transformer.

Gao et al., *Mimic before Reconstruct* (MR-MAE, 2023) and *ConvMAE* (NeurIPS 2022). The branches
that add the early stages' maps exist in masked pre-training only and are left out, as in the
fine-tuned classifier. Modules are named as in the authors' fine-tuned checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_tokens
from deploykit.backbones.layers.vit import TransformerBlock, resized_positions
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["ConvViT", "checkpoint_filter_fn", "convvit"]

_EPS = 1e-6

# widths, depths, heads of the last stage
_SIZES = {"convvit_b": ((256, 384, 768), (2, 2, 11), 12)}


class PatchEmbed(nn.Module):
    """Strided convolution, LayerNorm, GELU: (N, C, H, W) to (N, C', H / s, W / s)."""

    def __init__(self, dim: int, out: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, stride, stride=stride)
        self.norm = timm.layers.LayerNorm2d(out, eps=1e-5)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.proj(x)))
        return x


class ConvBlock(nn.Module):
    """``x += PW(DW5(PW(LN x))); x += PW-MLP(LN x)`` on (N, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = timm.layers.LayerNorm2d(dim, eps=_EPS)
        self.conv1 = nn.Conv2d(dim, dim, 1)
        self.attn = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.norm2 = timm.layers.LayerNorm2d(dim, eps=_EPS)
        self.mlp = timm.layers.Mlp(dim, 4 * dim, use_conv=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv2(self.attn(self.conv1(self.norm1(x))))
        x = x + self.mlp(self.norm2(x))
        return x


class ConvViT(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        depths: tuple[int, int, int],
        heads: int,
        num_classes: int,
        img_size: int,
    ) -> None:
        super().__init__()
        first, second, last = widths
        self.side = img_size // 16
        self.patch_embed1 = PatchEmbed(3, first, 4)
        self.patch_embed2 = PatchEmbed(first, second, 2)
        self.patch_embed3 = PatchEmbed(second, last, 2)
        self.patch_embed4 = nn.Linear(last, last)
        self.pos_embed = nn.Parameter(torch.randn(1, self.side**2, last) * 0.02)
        self.blocks1 = nn.Sequential(*(ConvBlock(first) for _ in range(depths[0])))
        self.blocks2 = nn.Sequential(*(ConvBlock(second) for _ in range(depths[1])))
        self.blocks3 = nn.Sequential(*(TransformerBlock(last, heads) for _ in range(depths[2])))
        self.fc_norm = nn.LayerNorm(last, eps=_EPS)
        self.head = nn.Linear(last, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks1(self.patch_embed1(x))
        x = self.blocks2(self.patch_embed2(x))
        x = self.patch_embed4(to_tokens(self.patch_embed3(x))) + self.pos_embed
        x = self.fc_norm(self.blocks3(x).mean(1))
        scores: Tensor = self.head(x)
        return scores


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The authors' fine-tuned state dict, its position table resized to the module's."""
    assert isinstance(module, ConvViT)
    table = resized_positions(state["pos_embed"], module.pos_embed, module.side, 0, 0)
    return {**state, "pos_embed": table}


@register_backbone(
    "ConvViT",
    {"convvit_b": Variant(paper_name="ConvViT-B (MR-MAE)", params_m=85.37, headline=True)},
    licence="mit",
    doc=242,
)
def convvit(variant: str, *, num_classes: int, img_size: int) -> ConvViT:
    """ConvViT-B; ``img_size`` is a multiple of 16."""
    check_side("ConvViT", img_size, 16)
    widths, depths, heads = _SIZES[variant]
    return ConvViT(widths, depths, heads, num_classes, img_size)
