"""CAS-ViT: Zhang et al., *CAS-ViT: Convolutional Additive Self-attention Vision Transformers for
Efficient Mobile Applications* (2024).

Attention without softmax or products of tokens: queries and keys are gated, added and multiplied
with the values, position by position (eq. 4 and 5). Modules are named as in the official
checkpoints (``rcvit_*``), which load as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["CasViT", "casvit"]

# channels and blocks of the four stages
_SIZES = {
    "casvit_xs": ((48, 56, 112, 220), (2, 2, 4, 2)),
    "casvit_s": ((48, 64, 128, 256), (3, 3, 6, 3)),
    "casvit_m": ((64, 96, 192, 384), (3, 3, 6, 3)),
    "casvit_t": ((96, 128, 256, 512), (3, 3, 6, 3)),
}


def _depthwise(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)


class SpatialGate(nn.Module):
    """``x * sigmoid(PW(ReLU(BN(DW3(x)))))`` with one gate a position (eq. 6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            _depthwise(dim),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, 1, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.block(x)
        return out


class ChannelGate(nn.Module):
    """``x * sigmoid(PW(mean(x)))`` with one gate a channel (eq. 6)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(dim, dim, 1, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x * self.block(x)
        return out


class AdditiveTokenMixer(nn.Module):
    """``proj(DW3(phi(q) + phi(k)) * v)``; phi gates positions, then channels (eq. 5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=False)
        self.oper_q = nn.Sequential(SpatialGate(dim), ChannelGate(dim))
        self.oper_k = nn.Sequential(SpatialGate(dim), ChannelGate(dim))
        self.dwc = _depthwise(dim)
        self.proj = _depthwise(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        out: Tensor = self.proj(self.dwc(self.oper_q(q) + self.oper_k(k)) * v)
        return out


class LocalIntegration(nn.Module):
    """``PW(GELU(DW3(BN(PW(x)))))``, width kept."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(dim, dim, 1),
            nn.BatchNorm2d(dim),
            _depthwise(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out


class AdditiveBlock(nn.Module):
    """Local integration, additive attention and an MLP, each added to a (N, C, H, W) map."""

    def __init__(self, dim: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.local_perception = LocalIntegration(dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.attn = AdditiveTokenMixer(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = timm.layers.ConvMlp(dim, mlp_ratio * dim, act_layer=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local_perception(x)
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Embedding(nn.Module):
    """Halves the map: ``BN(conv3 s2)``."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(x))
        return out


class CasViT(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes): the mean of the plain and the distillation head."""

    def __init__(self, dims: tuple[int, ...], depths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.patch_embed = nn.Sequential(
            nn.Conv2d(3, dims[0] // 2, 3, 2, 1),
            nn.BatchNorm2d(dims[0] // 2),
            nn.ReLU(),
            nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1),
            nn.BatchNorm2d(dims[0]),
            nn.ReLU(),
        )
        self.network = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if stage:
                self.network.append(Embedding(dims[stage - 1], dim))
            self.network.append(nn.Sequential(*(AdditiveBlock(dim) for _ in range(depth))))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.dist_head = nn.Linear(dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for stage in self.network:
            x = stage(x)
        features = self.norm(x).mean((2, 3))
        logits: Tensor = (self.head(features) + self.dist_head(features)) / 2
        return logits


@register_backbone(
    "CAS-ViT",
    {
        "casvit_xs": Variant(paper_name="CAS-ViT-XS", params_m=3.20, also=("rcvit_xs",)),
        "casvit_s": Variant(
            paper_name="CAS-ViT-S", params_m=5.76, also=("rcvit_s",), headline=True
        ),
        "casvit_m": Variant(paper_name="CAS-ViT-M", params_m=12.42, also=("rcvit_m",)),
        "casvit_t": Variant(paper_name="CAS-ViT-T", params_m=21.76, also=("rcvit_t",)),
    },
    licence="mit",
    doc=110,
)
def casvit(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a CAS-ViT; sizes are multiples of 32 pixels."""
    check_side("CAS-ViT", img_size)
    return CasViT(*_SIZES[variant], num_classes=num_classes)
