"""L2ViT: Zheng, *The Linear Attention Resurrection in Vision Transformer* (2025).

Windows of softmax attention and linear attention over the whole map take turns. How the official
checkpoints name the modules isn't established here, so that they may not load.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.windows import cut_windows, join_windows
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["L2ViT", "l2vit"]

_FLOOR = 100.0  # least value of the normaliser
# width, depths, heads of the first stage
_SIZES = {
    "l2vit_tiny": (96, (2, 2, 6, 2), 3),
    "l2vit_small": (96, (2, 2, 18, 2), 3),
    "l2vit_base": (128, (2, 2, 18, 2), 4),
}


class PositionConv(nn.Module):
    """Conditional position encoding, ``x + DW3(x)``: (N, HW, C) to the same."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + to_tokens(self.proj(to_map(x, self.side, self.side)))


class WindowAttention(nn.Module):
    """Softmax attention within windows: (N, HW, C) to the same."""

    def __init__(self, dim: int, heads: int, side: int, window: int) -> None:
        super().__init__()
        self.heads, self.side, self.window = heads, side, window
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        window = (self.window, self.window)
        x = cut_windows(x.unflatten(1, (self.side, self.side)), window).flatten(1, 2)
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split[0], split[1], split[2]
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        x = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return join_windows(x.unflatten(1, window), (self.side, self.side)).flatten(1, 2)


class LinearAttention(nn.Module):
    """``q (kᵀ v)`` with q and k rectified, normalised by ``max(q · Σk, 100)`` and scaled by a
    learned factor a head: (N, HW, C) to the same, in time linear in HW.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.tau = nn.Parameter(torch.full((heads, 1, 1), (dim // heads) ** -0.5))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = F.relu(split[0]), F.relu(split[1]), split[2]
        norm = (q @ k.sum(2, keepdim=True).transpose(-2, -1)).clamp(min=_FLOOR)
        y = q @ (k.transpose(-2, -1) @ v) * self.tau / norm
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class LocalConcentration(nn.Module):
    """DW7, GELU, BN, DW7 on the map: it sharpens what linear attention smears."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv1 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        x = to_map(x, self.side, self.side)
        return to_tokens(self.conv2(self.bn(F.gelu(self.conv1(x)))))


class WindowBlock(nn.Module):
    """Position, window attention, position, MLP; each added. (N, HW, C) to the same."""

    def __init__(self, dim: int, heads: int, side: int, window: int) -> None:
        super().__init__()
        self.cpe1 = PositionConv(dim, side)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, side, window)
        self.cpe2 = PositionConv(dim, side)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.cpe2(x + self.attn(self.norm1(x)))
        x = x + self.mlp(self.norm2(x))
        return x


class LinearBlock(nn.Module):
    """Position, linear attention, concentration, MLP; each added. (N, HW, C) to the same."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.cpe = PositionConv(dim, side)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = LinearAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.lcm = LocalConcentration(dim, side)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe(x)
        x = x + self.attn(self.norm1(x))
        x = x + self.lcm(self.norm2(x))
        x = x + self.mlp(self.norm3(x))
        return x


class Downsample(nn.Module):
    """LN, then a 2x2 convolution of stride 2: (N, HW, C) to (N, HW / 4, 2C)."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(dim)
        self.reduction = nn.Conv2d(dim, 2 * dim, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.reduction(to_map(self.norm(x), self.side, self.side)))


class L2ViT(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(
        self, width: int, depths: tuple[int, ...], heads: int, num_classes: int, img_size: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
        )
        self.stem_norm = nn.LayerNorm(width)
        window = img_size // 32  # 7 at 224 pixels
        stages: list[nn.Module] = []
        for stage, depth in enumerate(depths):
            dim, side = width * 2**stage, img_size // 2 ** (stage + 2)
            if stage:
                stages.append(Downsample(dim // 2, 2 * side))
            for index in range(depth):
                count = heads * 2**stage
                linear = index % 2 == 1
                stages.append(
                    LinearBlock(dim, count, side)
                    if linear
                    else WindowBlock(dim, count, side, window)
                )
        self.blocks = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(8 * width)
        self.head = nn.Linear(8 * width, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem_norm(to_tokens(self.stem(x))))
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


@register_backbone(
    "L2ViT",
    {
        "l2vit_tiny": Variant(paper_name="L2ViT-T", params_m=28.60, headline=True),
        "l2vit_small": Variant(paper_name="L2ViT-S", params_m=50.20),
        "l2vit_base": Variant(paper_name="L2ViT-B", params_m=88.58),
    },
    licence="mit",
    doc=49,
)
def l2vit(variant: str, *, num_classes: int, img_size: int) -> L2ViT:
    """L2ViT of one size; ``img_size`` is a multiple of 32.

    Windows are as wide as the last map, so that they divide every map: the paper's 7 at 224.
    """
    check_side("L2ViT", img_size)
    width, depths, heads = _SIZES[variant]
    return L2ViT(width, depths, heads, num_classes, img_size)
