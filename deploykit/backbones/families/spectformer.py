"""SpectFormer: Patro et al., *SpectFormer: Frequency and Attention is what you need in a Vision
Transformer* (2023).

Early blocks multiply spectra (global filters), later ones attend. The Fourier transforms are
products with constant matrices, so that they export. The auxiliary head of token labelling serves
training only; it isn't among the published parameters, and a checkpoint's is left out. Filters and
positions belong to one image size; those of another are resized when loaded. How the authors'
checkpoints name their tensors is not known here. The vanilla Ti has 256 channels, which the
published six heads don't divide: four are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit._compat import timm
from deploykit.backbones.layers.dft import RealFourier2d
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.vit import SelfAttention, TransformerBlock, resized_positions
from deploykit.backbones.registry import Variant, register_backbone

__all__ = [
    "HierarchicalSpectFormer",
    "VanillaSpectFormer",
    "checkpoint_filter_fn",
    "spectformer",
]

_EPS = 1e-6
_RATIOS = (8, 8, 4, 4)

# stem width, widths, depths, heads of the last two stages
_HIERARCHICAL = {
    "spectformer_h_s": (32, (64, 128, 320, 448), (3, 4, 6, 3), (10, 14)),
    "spectformer_h_b": (64, (64, 128, 320, 512), (3, 4, 12, 3), (10, 16)),
    "spectformer_h_l": (64, (96, 192, 384, 512), (3, 6, 18, 3), (12, 16)),
}
# width, depth, heads
_VANILLA = {
    "spectformer_ti": (256, 12, 4),
    "spectformer_xs": (384, 12, 6),
    "spectformer_s": (384, 19, 6),
    "spectformer_b": (512, 19, 8),
}
_SPECTRAL_BLOCKS = 4  # of the vanilla networks


class SpectralGating(nn.Module):
    """Spectrum times learned weights; (N, side², C) to (N, side², C)."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        # real and imaginary parts last, as torch.view_as_complex wants them
        self.complex_weight = nn.Parameter(torch.randn(side, side // 2 + 1, dim, 2) * 0.02)
        self.fourier = RealFourier2d(side, side)

    def forward(self, x: Tensor) -> Tensor:
        weight, weight_i = self.complex_weight.permute(3, 2, 0, 1).unbind(0)  # (C, H, W // 2 + 1)
        real, imaginary = self.fourier.transform(to_map(x, self.side, self.side))
        x = self.fourier.inverse(
            real * weight - imaginary * weight_i, real * weight_i + imaginary * weight
        )
        return to_tokens(x)


class ConvFFN(nn.Module):
    """Linear, depthwise 3×3, GELU, linear on (N, side², C)."""

    def __init__(self, dim: int, ratio: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.dwconv = nn.Conv2d(ratio * dim, ratio * dim, 3, padding=1, groups=ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(to_map(self.fc1(x), self.side, self.side))
        x = self.fc2(F.gelu(to_tokens(x)))
        return x


class MixerBlock(nn.Module):
    """``x += mixer(LN x); x += FFN(LN x)``: the mixer gates a spectrum, or attends."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class ClassBlock(nn.Module):
    """The class token attends to all tokens, then an MLP: (N, 1 + L, C) to (N, 1, C).

    Touvron et al., *Going deeper with Image Transformers* (ICCV 2021), class attention.
    """

    def __init__(self, dim: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = timm.layers.Mlp(dim, ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q = self.q(y[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2) * self.scale
        k, v = self.kv(y).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1)).softmax(-1)
        token: Tensor = x[:, :1] + self.proj((attention @ v).transpose(1, 2).flatten(2))
        token = token + self.mlp(self.norm2(token))
        return token


class Stem(nn.Module):
    """7×7 and two 3×3 convolutions with BN and ReLU, then 3×3 to C: stride 4, (N, C, H, W)."""

    def __init__(self, hidden: int, out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for dim, kernel, stride in ((3, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
            layers += [nn.Conv2d(dim, hidden, kernel, stride, kernel // 2, bias=False)]
            layers += [nn.BatchNorm2d(hidden), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(hidden, out, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(self.conv(x))
        return x


class HierarchicalSpectFormer(nn.Module):
    """Four stages, two of them spectral; float32 (N, 3, S, S) to (N, classes)."""

    def __init__(
        self,
        stem: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, int],
        num_classes: int,
        img_size: int,
    ) -> None:
        super().__init__()
        self.sides = [img_size // 2 ** (stage + 2) for stage in range(4)]
        embeds: list[nn.Module] = [Stem(stem, widths[0])]
        embeds += [nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1) for i in range(3)]
        self.embeds = nn.ModuleList(embeds)
        self.embed_norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        stages = []
        for stage, (dim, depth, side) in enumerate(zip(widths, depths, self.sides, strict=True)):
            blocks = [
                MixerBlock(
                    dim,
                    SpectralGating(dim, side)
                    if stage < 2
                    else SelfAttention(dim, heads[stage - 2]),
                    ConvFFN(dim, _RATIOS[stage], side),
                )
                for _ in range(depth)
            ]
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.stage_norms = nn.ModuleList(nn.LayerNorm(width, eps=_EPS) for width in widths[:3])
        self.class_block = ClassBlock(widths[-1], heads[1], _RATIOS[-1])
        self.norm = nn.LayerNorm(widths[-1], eps=_EPS)
        self.head = nn.Linear(widths[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for stage, side in enumerate(self.sides):
            x = self.embed_norms[stage](to_tokens(self.embeds[stage](x)))
            x = self.stages[stage](x)
            if stage < 3:
                x = to_map(self.stage_norms[stage](x), side, side)
        token = self.class_block(torch.cat((x.mean(1, keepdim=True), x), dim=1))
        scores: Tensor = self.head(self.norm(token).flatten(1))
        return scores


class VanillaSpectFormer(nn.Module):
    """ViT/16 whose first four blocks are spectral; float32 (N, 3, S, S) to (N, classes)."""

    def __init__(self, dim: int, depth: int, heads: int, num_classes: int, img_size: int) -> None:
        super().__init__()
        side = img_size // 16
        self.patch_embed = nn.Conv2d(3, dim, 16, stride=16)
        self.pos_embed = nn.Parameter(torch.randn(1, side**2, dim) * 0.02)
        spectral: list[nn.Module] = [
            MixerBlock(dim, SpectralGating(dim, side), timm.layers.Mlp(dim, 4 * dim))
            for _ in range(_SPECTRAL_BLOCKS)
        ]
        attending = [TransformerBlock(dim, heads) for _ in range(depth - _SPECTRAL_BLOCKS)]
        self.blocks = nn.Sequential(*spectral, *attending)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = to_tokens(self.patch_embed(x)) + self.pos_embed
        x = self.norm(self.blocks(x)).mean(1)
        scores: Tensor = self.head(x)
        return scores


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The state dict without the training head, filters and positions resized to the module's."""
    wanted = module.state_dict()
    kept = {name: value for name, value in state.items() if not name.startswith("aux_head.")}
    for name, value in kept.items():
        if name.endswith("complex_weight"):
            planes, (rows, columns) = value.permute(3, 2, 0, 1), wanted[name].shape[:2]
            resized = F.interpolate(planes, (rows, columns), mode="bicubic", align_corners=True)
            kept[name] = resized.permute(2, 3, 1, 0)
        elif name == "pos_embed":
            side = int(wanted[name].shape[1] ** 0.5)
            kept[name] = resized_positions(value, wanted[name], side, 0, 0)
    return kept


@register_backbone(
    "SpectFormer",
    {
        "spectformer_h_s": Variant(paper_name="SpectFormer-H-S", params_m=21.78, headline=True),
        "spectformer_h_b": Variant(paper_name="SpectFormer-H-B", params_m=32.54),
        "spectformer_h_l": Variant(paper_name="SpectFormer-H-L", params_m=54.16),
        "spectformer_ti": Variant(paper_name="SpectFormer-Ti (after the paper)", params_m=9.16),
        "spectformer_xs": Variant(paper_name="SpectFormer-XS", params_m=20.03),
        "spectformer_s": Variant(paper_name="SpectFormer-S", params_m=32.45),
        "spectformer_b": Variant(paper_name="SpectFormer-B", params_m=57.16),
    },
    doc=200,
)
def spectformer(
    variant: str, *, num_classes: int, img_size: int
) -> HierarchicalSpectFormer | VanillaSpectFormer:
    """SpectFormer of one size; ``img_size`` is a multiple of 32 (vanilla: of 16)."""
    if variant in _HIERARCHICAL:
        check_side("SpectFormer", img_size)
        return HierarchicalSpectFormer(*_HIERARCHICAL[variant], num_classes, img_size)
    check_side("SpectFormer", img_size, 16)
    return VanillaSpectFormer(*_VANILLA[variant], num_classes, img_size)
