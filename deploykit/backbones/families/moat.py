"""MOAT and tiny-MOAT: Yang et al., *MOAT: Alternating Mobile Convolution and Attention Brings
Strong Vision Models* (ICLR 2023).

A MOAT block is an inverted bottleneck followed by attention, without an MLP (fig. 1, d). The
official weights are TensorFlow checkpoints, whose reader is not part of this package; strided
convolutions therefore pad as TensorFlow's ``same`` does, and BatchNorm has Keras' epsilon, so that
converted weights mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.relative_bias import relative_index, resized_bias
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["Moat", "checkpoint_filter_fn", "moat"]

_HEAD = 32
_RATIO = 4
_BN_EPS = 1e-3

# stem width, widths and depths of the stages: 2 of inverted bottlenecks, 2 of MOAT blocks
_TINY_DEPTHS = (2, 3, 7, 2)
_SIZES = {
    **{
        f"tiny_moat_{i}": (width, (width, 2 * width, 4 * width, 8 * width), _TINY_DEPTHS)
        for i, width in enumerate((32, 40, 56, 80))
    },
    "moat_0": (64, (96, 192, 384, 768), (2, 3, 7, 2)),
    "moat_1": (64, (96, 192, 384, 768), (2, 6, 14, 2)),
    "moat_2": (128, (128, 256, 512, 1024), (2, 6, 14, 2)),
    "moat_3": (160, (160, 320, 640, 1280), (2, 12, 28, 2)),
    "moat_4": (256, (256, 512, 1024, 2048), (2, 12, 28, 2)),
}


def _norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=_BN_EPS)


class SameConv(nn.Conv2d):
    """A 3 x 3 convolution of an even-sided map, padded as TensorFlow's ``same``.

    At stride 2 all of the padding is on the right and at the bottom.
    """

    def __init__(self, dim: int, out: int, stride: int, *, groups: int = 1, bias: bool = True):
        padding = 1 if stride == 1 else 0
        super().__init__(dim, out, 3, stride, padding, groups=groups, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] > 1:
            input = F.pad(input, (0, 1, 0, 1))
        return super().forward(input)


class InvertedBottleneck(nn.Module):
    """MBConv with BatchNorm first, (N, C, H, W) to (N, D, H/s, W/s), added to its shortcut."""

    def __init__(self, dim: int, out: int, stride: int, *, squeeze: bool) -> None:
        super().__init__()
        hidden = _RATIO * out
        self.norm1 = _norm(dim)
        self.expand = nn.Conv2d(dim, hidden, 1, bias=False)
        self.norm2 = _norm(hidden)
        self.depthwise = SameConv(hidden, hidden, stride, groups=hidden, bias=False)
        self.norm3 = _norm(hidden)
        self.se = (
            timm.layers.SqueezeExcite(hidden, rd_channels=out // 4, act_layer=nn.SiLU)
            if squeeze
            else nn.Identity()
        )
        self.project = nn.Conv2d(hidden, out, 1)
        self.pool = nn.AvgPool2d(2) if stride > 1 else nn.Identity()
        self.shortcut = nn.Conv2d(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm2(self.expand(self.norm1(x))))
        y = self.se(F.gelu(self.norm3(self.depthwise(y))))
        out: Tensor = self.shortcut(self.pool(x)) + self.project(y)
        return out


class BiasedAttention(nn.Module):
    """Attention of all positions to all, with a relative position bias; (N, L, C) to itself."""

    index: Tensor

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.heads, self.scale = dim // _HEAD, _HEAD**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.bias_table = nn.Parameter(torch.empty(self.heads, 2 * side - 1, 2 * side - 1))
        timm.layers.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("index", relative_index(side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        attention = (scores + self.bias_table.flatten(1)[:, self.index]).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out


class MoatBlock(nn.Module):
    """An inverted bottleneck without squeeze, then ``x += attention(LN x)``, no MLP (fig. 1, d)."""

    def __init__(self, dim: int, out: int, stride: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.mbconv = InvertedBottleneck(dim, out, stride, squeeze=False)
        self.norm = nn.LayerNorm(out)
        self.attn = BiasedAttention(out, side)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mbconv(x)
        tokens = to_tokens(x)
        return to_map(tokens + self.attn(self.norm(tokens)), self.side, self.side)


class Moat(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes); attention is global, at strides 16 and 32."""

    def __init__(
        self,
        stem: int,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        num_classes: int,
        img_size: int,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Sequential(
            SameConv(3, stem, 2), _norm(stem), nn.GELU(), SameConv(stem, stem, 1)
        )
        self.stages = nn.ModuleList()
        before = stem
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            side = img_size // 4 // 2**stage
            blocks: list[nn.Module] = []
            for block in range(depth):
                stride = 1 if block else 2
                if stage < 2:
                    blocks.append(InvertedBottleneck(before, dim, stride, squeeze=True))
                else:
                    blocks.append(MoatBlock(before, dim, stride, side))
                before = dim
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(before)
        self.head = nn.Linear(before, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.norm(x.mean((2, 3))))
        return logits


def checkpoint_filter_fn(state: Mapping[str, Tensor], module: Moat) -> dict[str, Tensor]:
    """A checkpoint of ``Moat`` at another image size: its bias tables resized bilinearly."""
    wanted = module.state_dict()
    return {
        name: resized_bias(value, (wanted[name].shape[-1] + 1) // 2)
        if name.endswith("bias_table")
        else value
        for name, value in state.items()
    }


@register_backbone(
    "MOAT",
    {
        "moat_0": Variant(paper_name="MOAT-0", params_m=27.85, headline=True),
        "moat_1": Variant(paper_name="MOAT-1", params_m=41.60),
        "moat_2": Variant(paper_name="MOAT-2", params_m=73.42, input=384, crop_pct=1.0),
        "moat_3": Variant(paper_name="MOAT-3", params_m=189.96, input=512, crop_pct=1.0),
        "moat_4": Variant(paper_name="MOAT-4", params_m=483.21, input=512, crop_pct=1.0),
        "tiny_moat_0": Variant(paper_name="tiny-MOAT-0", params_m=3.36, input=256),
        "tiny_moat_1": Variant(paper_name="tiny-MOAT-1", params_m=5.12, input=256),
        "tiny_moat_2": Variant(paper_name="tiny-MOAT-2", params_m=9.77, input=256),
        "tiny_moat_3": Variant(paper_name="tiny-MOAT-3", params_m=19.53, input=256),
    },
    licence="apache-2.0",
    doc=240,
)
def moat(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a MOAT or tiny-MOAT; sizes are multiples of 32 pixels."""
    check_side("MOAT", img_size)
    return Moat(*_SIZES[variant], num_classes=num_classes, img_size=img_size)
