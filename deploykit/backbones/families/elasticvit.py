"""ElasticViT: Tang et al., *ElasticViT: Conflict-aware Supernet Training for Deploying Fast Vision
Transformer on Diverse Mobile Devices* (ICCV 2023). The published subnets, each a net of its own.

Convolutions in two stages, attention with biases by position in four. How the checkpoints cut
from the official supernet name their tensors isn't established here, so they are not converted;
the order of queries, keys and values inside a layer is the supernet's (see ``TokenAttention``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.relative_bias import relative_index
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["ElasticViT", "elasticvit"]

_HEAD = 16  # width of a head's queries and keys
_STRIDES = (2, 2, 2, 1, 2, 2)  # of each stage's first block, after a stem of stride 2
_FEATURES = 1984


@dataclass(frozen=True)
class _Size:
    """A subnet.

    Attributes:
        dims, depths: of the stem, two stages of convolutions and four of attention.
        conv_ratios, kernels: one for each convolutional block; the last goes on to the end.
        mlp_ratios, v_scales: one for each attention layer; the last goes on to the end.
    """

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    conv_ratios: tuple[int, ...]
    kernels: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    v_scales: tuple[int, ...] = (2,)


_SIZES = {
    "elasticvit_t1": _Size(
        (16, 24, 32, 64, 96, 176, 272), (1, 2, 3, 1, 1, 1, 1), (1, 3), (3,), (2, 2, 3, 4)
    ),
    "elasticvit_t2": _Size(
        (16, 24, 40, 48, 96, 176, 256), (1, 2, 3, 1, 1, 2, 2), (1, 3), (3,), (3, 4, 3, 3, 2, 2)
    ),
    "elasticvit_s1": _Size(
        (16, 24, 40, 64, 96, 192, 272), (1, 3, 3, 2, 2, 2, 2), (1, 3), (3,),
        (2, 2, 2, 2, 3, 3, 4, 4),
    ),
    "elasticvit_s2": _Size(
        (16, 24, 48, 64, 96, 192, 256), (1, 3, 3, 2, 2, 2, 2), (1, 3), (3,),
        (2, 2, 2, 2, 2, 2, 4, 4),
    ),
    "elasticvit_m": _Size(
        (16, 32, 48, 64, 96, 192, 288), (1, 3, 5, 2, 2, 2, 2), (1, 3), (5, 3),
        (2, 2, 4, 4, 4, 4, 5, 5),
    ),
    "elasticvit_l1": _Size(
        (16, 24, 40, 64, 96, 192, 320), (1, 3, 3, 2, 2, 2, 2), (1, 3, 3, 3, 6, 6, 6), (5,),
        (4, 4, 3, 3, 4, 4, 4, 4),
    ),
    "elasticvit_l1.5": _Size(
        (16, 24, 48, 64, 96, 256, 320), (2, 4, 4, 2, 2, 2, 2), (1, 1, 3, 3, 3, 3, 4, 4, 4, 4),
        (3, 3, 3, 3, 3, 3, 5), (4, 4, 5, 5, 3, 3, 5, 5),
    ),
    "elasticvit_l2": _Size(
        (16, 24, 40, 80, 128, 256, 304), (1, 3, 4, 2, 2, 2, 2), (1, 6), (3,),
        (3, 3, 2, 2, 3, 3, 5, 5), (2, 2, 2, 2, 2, 2, 3, 3),
    ),
    "elasticvit_l3": _Size(
        (16, 32, 48, 80, 128, 256, 320), (1, 3, 4, 2, 2, 2, 2), (1, 5), (5, 3, 3, 3, 5),
        (4, 4, 4, 4, 3, 3, 5, 5),
    ),
}  # fmt: skip


def _and_on(values: tuple[int, ...]) -> Iterator[int]:
    """The values, then the last one for ever."""
    yield from values
    while True:
        yield values[-1]


class MBConv(nn.Module):
    """PW, DW k, [squeeze-excitation], PW, each with BN, hardswish between; with a shortcut.

    (N, C, side, side) to (N, D, side/s, side/s), rounded up. Where the width changes the shortcut
    is a pooled projection.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        ratio: int,
        kernel: int,
        stride: int,
        side: int,
        *,
        squeeze: bool,
    ) -> None:
        super().__init__()
        hidden = ratio * dim
        layers: list[nn.Module] = []
        if ratio > 1:
            layers += [nn.Conv2d(dim, hidden, 1, bias=False), nn.BatchNorm2d(hidden)]
            layers += [nn.Hardswish()]
        depthwise = nn.Conv2d(
            hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False
        )
        layers += [depthwise, nn.BatchNorm2d(hidden), nn.Hardswish()]
        if squeeze:
            gate = nn.Hardsigmoid
            layers += [timm.layers.SqueezeExcite(hidden, rd_ratio=0.25, gate_layer=gate)]
        layers += [nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.layers = nn.Sequential(*layers)
        shortcut: list[nn.Module] = []
        if stride > 1:  # an odd side is padded, as the strided convolution pads it
            shortcut.append(nn.AvgPool2d(stride, padding=side % 2))
        if dim != out:
            shortcut.append(nn.Conv2d(dim, out, 1, bias=False))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.shortcut(x) + self.layers(x)
        return out


class TokenAttention(nn.Module):
    """Attention with a bias by relative position, values through DW3; (N, side², C) to itself.

    All queries stand first in the projection's output, then all keys, then all values, but it is
    cut head by head, each head taking what comes: so the supernet does, and weights trained in it
    need the same order.
    """

    index: Tensor

    def __init__(self, dim: int, v_scale: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = dim // _HEAD, side
        self.value = v_scale * _HEAD
        width = self.heads * self.value
        self.qkv = nn.Linear(dim, 2 * dim + width, bias=False)
        self.local = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        self.proj = nn.Linear(width, dim)
        self.bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, self.heads))
        timm.layers.trunc_normal_(self.bias_table, std=0.02)
        self.register_buffer("index", relative_index(side), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q, k, v = qkv.split([_HEAD, _HEAD, self.value], dim=-1)
        v = to_map(v.transpose(1, 2).flatten(2), self.side, self.side)
        v = to_tokens(self.local(v)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        bias = self.bias_table[self.index].permute(2, 0, 1)
        attention = ((q * _HEAD**-0.5) @ k.transpose(-2, -1) + bias).softmax(-1)
        y = (attention @ v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(F.hardswish(y))
        return out


class TokenLayer(nn.Module):
    """``x += attention(LN x); x += MLP(LN x)`` on (N, L, C)."""

    def __init__(self, dim: int, mlp_ratio: int, v_scale: int, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, v_scale, side)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, mlp_ratio * dim, act_layer=nn.Hardswish)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TokenStage(nn.Module):
    """An MBConv that sets width and stride, then attention layers; map to map."""

    def __init__(self, before: int, layers: list[TokenLayer], dim: int, stride: int, side: int):
        super().__init__()
        self.side = -(-side // stride)
        self.embed = MBConv(before, dim, 6, 3, stride, side, squeeze=True)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return to_map(self.layers(to_tokens(self.embed(x))), self.side, self.side)


class ElasticViT(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes); the last map is at stride 64."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        dims, depths, side = size.dims, size.depths, img_size // 2
        ratios, kernels = _and_on(size.conv_ratios), _and_on(size.kernels)
        mlp_ratios, v_scales = _and_on(size.mlp_ratios), _and_on(size.v_scales)
        conv = nn.Conv2d(3, dims[0], 3, 2, 1, bias=False)
        stem: list[nn.Module] = [conv, nn.BatchNorm2d(dims[0]), nn.Hardswish()]
        for _ in range(depths[0]):
            stem.append(
                MBConv(dims[0], dims[0], next(ratios), next(kernels), 1, side, squeeze=False)
            )
        self.stem = nn.Sequential(*stem)
        self.stages = nn.ModuleList()
        for stage, stride in enumerate(_STRIDES):
            before, dim, depth = dims[stage], dims[stage + 1], depths[stage + 1]
            after = -(-side // stride)
            if stage < 2:
                blocks = (
                    MBConv(
                        dim if block else before,
                        dim,
                        next(ratios),
                        next(kernels),
                        1 if block else stride,
                        after if block else side,
                        squeeze=stage == 1,
                    )
                    for block in range(depth)
                )
                self.stages.append(nn.Sequential(*blocks))
            else:
                layers = [
                    TokenLayer(dim, next(mlp_ratios), next(v_scales), after) for _ in range(depth)
                ]
                self.stages.append(TokenStage(before, layers, dim, stride, side))
            side = after
        self.expand = nn.Linear(dims[-1], 6 * dims[-1], bias=False)
        self.norm = nn.BatchNorm1d(6 * dims[-1])
        self.features = nn.Linear(6 * dims[-1], _FEATURES)
        self.head = nn.Linear(_FEATURES, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        x = self.norm(self.expand(to_tokens(x)).transpose(1, 2))
        x = F.hardswish(x).mean(2)
        logits: Tensor = self.head(F.hardswish(self.features(x)))
        return logits


# The paper gives no numbers of parameters: these are counted here.
@register_backbone(
    "ElasticViT",
    {
        "elasticvit_t1": Variant(paper_name="ElasticViT-T1", params_m=8.9, input=128),
        "elasticvit_t2": Variant(paper_name="ElasticViT-T2", params_m=9.3, input=160),
        "elasticvit_s1": Variant(
            paper_name="ElasticViT-S1", params_m=10.8, input=192, headline=True
        ),
        "elasticvit_s2": Variant(paper_name="ElasticViT-S2", params_m=10.2),
        "elasticvit_m": Variant(paper_name="ElasticViT-M", params_m=12.0),
        "elasticvit_l1": Variant(paper_name="ElasticViT-L1", params_m=12.8, input=256),
        "elasticvit_l1.5": Variant(paper_name="ElasticViT-L1.5", params_m=14.7, input=256),
        "elasticvit_l2": Variant(paper_name="ElasticViT-L2", params_m=14.9, input=256),
        "elasticvit_l3": Variant(paper_name="ElasticViT-L3", params_m=15.3, input=256),
    },
    licence="mit",
    doc=147,
)
def elasticvit(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build an ElasticViT subnet; sizes are multiples of 32 pixels."""
    check_side("ElasticViT", img_size)
    return ElasticViT(_SIZES[variant], num_classes, img_size)
