"""DualToken-ViT: Chu et al., *DualToken-ViT: Position-aware Efficient Vision Transformer with Dual
Token Fusion* (2023). After the paper: there is no official code, and the widths aren't known.

The skeleton is LightViT's (Huang et al., 2022): three stages at strides 8, 16 and 32, and gates
over positions and channels after the MLP. Widths and depths were chosen to meet the paper's
multiply-adds (0.5 and 1.0 G) and parameters; the two branches are fused by a sum. Nobody
publishes weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["DualTokenBlock", "DualTokenViT", "dualtoken_vit"]

_STRIDE = 32  # of the global tokens: 7 x 7 at 224 pixels
_GATE = 0.25  # width of the gates' hidden layers


@dataclass(frozen=True)
class _Size:
    dims: tuple[int, int, int]
    depths: tuple[int, int, int]
    heads: tuple[int, int, int]
    has_mixing: bool = False


_SIZES = {
    "dualtoken_vit_t": _Size((64, 128, 256), (1, 3, 2), (2, 4, 8)),
    "dualtoken_vit_t_mix": _Size((64, 128, 256), (1, 3, 2), (2, 4, 8), has_mixing=True),
    "dualtoken_vit_s": _Size((64, 128, 320), (2, 8, 2), (2, 4, 10)),
    "dualtoken_vit_s_mix": _Size((64, 128, 320), (2, 8, 2), (2, 4, 10), has_mixing=True),
}


class Attention(nn.Module):
    """Heads of ``softmax(q k^T / sqrt(d)) v``: (N, L, C) asks (N, M, C), and gets (N, L, C)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv(source).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out


class LocalBranch(nn.Module):
    """A ConvNeXt block on (N, C, H, W): DW7, LN, linear to 4C, GELU, linear; added to its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class GlobalTokens(nn.Module):
    """The local map's summary, enriched by tokens that know their place; (N, g², C).

    The map is halved until it has ``g`` x ``g`` positions, by a depthwise convolution and a mean
    each time; they attend to each other; the weighted sum with the running global tokens goes
    through an MLP over channels or, in the "mix" versions, over tokens.
    """

    def __init__(self, dim: int, heads: int, side: int, grid: int, *, has_mixing: bool) -> None:
        super().__init__()
        halvings = (side // grid).bit_length() - 1
        steps: list[nn.Module] = []
        for _ in range(halvings):
            steps += [nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.AvgPool2d(2)]
        self.steps = nn.Sequential(*steps)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.weights = nn.Parameter(torch.full((2,), 0.5))
        self.norm2 = nn.LayerNorm(dim)
        self.has_mixing = has_mixing
        width = grid * grid if has_mixing else dim
        self.mlp = timm.layers.Mlp(width, 2 * width)

    def forward(self, local: Tensor, known: Tensor) -> Tensor:
        tokens = to_tokens(self.steps(local))
        y = self.norm1(tokens)
        tokens = tokens + self.attn(y, y)
        tokens = self.weights[0] * tokens + self.weights[1] * known
        y = self.norm2(tokens)
        y = self.mlp(y.transpose(1, 2)).transpose(1, 2) if self.has_mixing else self.mlp(y)
        out: Tensor = tokens + y
        return out


class BiDimensionalGate(nn.Module):
    """``x`` times a gate for each channel and one for each position (LightViT, eq. 5 to 7)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim * _GATE)
        self.norm = nn.LayerNorm(dim)
        self.overall = nn.Linear(dim, hidden)
        self.local = nn.Linear(dim, hidden)
        self.channel = nn.Linear(hidden, dim)
        self.position = nn.Linear(2 * hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        overall = F.gelu(self.overall(y.mean(1, keepdim=True)))
        local = F.gelu(self.local(y))
        both = torch.cat((local, overall.expand(-1, local.shape[1], -1)), dim=-1)
        out: Tensor = x * self.channel(overall).sigmoid() * self.position(both).sigmoid()
        return out


class DualTokenBlock(nn.Module):
    """Local and global branch, fused; then a gated MLP. Map (N, C, H, W) and tokens (N, g², C)."""

    def __init__(self, dim: int, heads: int, side: int, grid: int, *, has_mixing: bool) -> None:
        super().__init__()
        self.side = side
        self.local = LocalBranch(dim)
        self.tokens = GlobalTokens(dim, heads, side, grid, has_mixing=has_mixing)
        self.norm1 = nn.LayerNorm(dim)
        self.broadcast = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)
        self.gate = BiDimensionalGate(dim)

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        x = self.local(x)
        known = self.tokens(x, known)
        y = to_tokens(x)
        y = y + self.broadcast(self.norm1(y), known)
        y = y + self.gate(self.mlp(self.norm2(y)))
        return to_map(y, self.side, self.side), known


class Merge(nn.Module):
    """Halves the map: linear of the normed 2 x 2 patch, plus linear of its maximum (LightViT)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, out, bias=False)
        self.skip = nn.Linear(dim, out, bias=False)
        self.known_norm = nn.LayerNorm(dim)
        self.known = nn.Linear(dim, out)

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        side = x.shape[2] // 2
        patches = to_tokens(F.pixel_unshuffle(x, 2))
        y = self.reduce(self.norm(patches)) + self.skip(to_tokens(F.max_pool2d(x, 2)))
        return to_map(y, side, side), self.known(self.known_norm(known))


def _stem(dim: int) -> nn.Sequential:
    """Stride 8: conv3 s2, DW3, DW3, DW3 s2, each with BN and GELU, then conv3 s2."""
    half = dim // 2
    layers: list[nn.Module] = [nn.Conv2d(3, half, 3, 2, 1), nn.BatchNorm2d(half), nn.GELU()]
    for stride in (1, 1, 2):
        conv = nn.Conv2d(half, half, 3, stride, 1, groups=half)
        layers += [conv, nn.BatchNorm2d(half), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(half, dim, 3, 2, 1), timm.layers.LayerNorm2d(dim))


class DualTokenViT(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes); the global tokens go through all stages."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        grid = img_size // _STRIDE
        self.stem = _stem(size.dims[0])
        self.known = nn.Parameter(torch.empty(1, grid * grid, size.dims[0]))
        timm.layers.trunc_normal_(self.known, std=0.02)
        self.merges, self.stages = nn.ModuleList(), nn.ModuleList()
        stages = zip(size.dims, size.depths, size.heads, strict=True)
        for i, (dim, depth, heads) in enumerate(stages):
            if i:
                self.merges.append(Merge(size.dims[i - 1], dim))
            side, mixing = img_size // 8 // 2**i, size.has_mixing
            self.stages.append(
                nn.ModuleList(
                    DualTokenBlock(dim, heads, side, grid, has_mixing=mixing) for _ in range(depth)
                )
            )
        self.norm = nn.LayerNorm(size.dims[-1])
        self.head = nn.Linear(size.dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        known = self.known
        for i, stage in enumerate(self.stages):
            if i:
                x, known = self.merges[i - 1](x, known)
            for block in stage.children():
                x, known = block(x, known)
        logits: Tensor = self.head(self.norm(to_tokens(x)).mean(1))
        return logits


# The numbers of parameters are counted here; the paper's are 0.5 and 1.0 G multiply-adds.
@register_backbone(
    "DualToken-ViT",
    {
        "dualtoken_vit_t": Variant(
            paper_name="DualToken-ViT-T (after the paper)", params_m=5.9, also=("dualtoken_t",)
        ),
        "dualtoken_vit_t_mix": Variant(
            paper_name="DualToken-ViT-T mix (after the paper)", params_m=5.2
        ),
        "dualtoken_vit_s": Variant(
            paper_name="DualToken-ViT-S (after the paper)",
            params_m=10.7,
            also=("dualtoken_s",),
            headline=True,
        ),
        "dualtoken_vit_s_mix": Variant(
            paper_name="DualToken-ViT-S mix (after the paper)", params_m=9.4
        ),
    },
    doc=82,
)
def dualtoken_vit(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a DualToken-ViT; sizes are multiples of 32 pixels."""
    check_side("DualToken-ViT", img_size)
    return DualTokenViT(_SIZES[variant], num_classes, img_size)
