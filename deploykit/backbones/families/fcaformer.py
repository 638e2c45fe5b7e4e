"""FcaFormer: Zhang et al., *FcaFormer: Forward Cross Attention in Hybrid Vision Transformer*
(ICCV 2023), the hybrid models L1 to L4.

How the official checkpoints name the modules isn't established here, so that they may not load.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["FcaFormer", "checkpoint_filter_fn", "fcaformer"]

# widths, depths, heads of the third and fourth stage
_SIZES = {
    "fcaformer_l1": ((64, 128, 192, 320), (2, 2, 6, 2), (6, 10)),
    "fcaformer_l2": ((96, 192, 320, 480), (2, 2, 7, 2), (10, 15)),
    "fcaformer_l3": ((96, 192, 320, 512), (3, 6, 12, 3), (10, 16)),
    "fcaformer_l4": ((128, 256, 512, 768), (3, 6, 12, 3), (16, 24)),
}


class ConvBlock(nn.Module):
    """ConvNeXt block: ``x += scale · linear(GELU(linear(LN(DW7 x))))`` on (N, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        out: Tensor = x + y.permute(0, 3, 1, 2)
        return out


class CrossAttention(nn.Module):
    """Own tokens attend to themselves and to tokens of earlier blocks (paper, section 3.2).

    Own tokens (N, T, C) and ``earlier`` (N, E, C), both normed; gives (N, T, C). Own tokens have
    a bias by distance along each axis (LeViT, section 4.2), earlier ones a bias each.
    """

    own_places: Tensor

    def __init__(self, dim: int, heads: int, side: int, earlier: int) -> None:
        super().__init__()
        self.heads, self.own = heads, side * side
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))
        self.earlier_biases = nn.Parameter(torch.zeros(heads, 1, earlier))
        position = torch.arange(side)
        distance = (position.unsqueeze(1) - position).abs()
        places = distance.view(side, 1, side, 1) * side + distance.view(1, side, 1, side)
        self.register_buffer("own_places", places.flatten(), persistent=False)

    def forward(self, x: Tensor, earlier: Tensor | None) -> Tensor:
        bias = self.attention_biases.index_select(1, self.own_places)
        bias = bias.view(self.heads, self.own, self.own)
        if earlier is None:
            seen = x
        else:
            seen = torch.cat((x, earlier), dim=1)
            bias = torch.cat((bias, self.earlier_biases.expand(-1, self.own, -1)), dim=2)
        split = self.qkv(seen).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = split[0][:, :, : self.own], split[1], split[2]
        attention = (q * self.scale @ k.transpose(-2, -1) + bias).softmax(-1)
        y: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return y


class FcaBlock(nn.Module):
    """Attention with cross tokens, a depthwise 3x3, an MLP (paper, figure 3).

    (N, T, C) and the ``earlier`` tokens (N, E, C) to (N, T, C) and this block's own summary for
    the blocks after it, a strided depthwise 7x7 of the map: (N, 16, C) of 14x14.
    """

    def __init__(self, dim: int, heads: int, side: int, earlier: int, *, summary: bool) -> None:
        super().__init__()
        self.side = side
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CrossAttention(dim, heads, side, earlier)
        if earlier:
            self.earlier_scale = nn.Parameter(torch.ones(1, earlier, 1))
            self.earlier_norm = nn.LayerNorm(dim)
        self.gamma1 = nn.Parameter(1e-6 * torch.ones(dim))
        self.summary = (
            nn.Conv2d(dim, dim, 7, stride=4, padding=3, groups=dim, bias=False) if summary else None
        )
        self.mix = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.BatchNorm2d(dim)
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)
        self.gamma2 = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor, earlier: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if earlier is not None:
            earlier = self.earlier_norm(earlier * self.earlier_scale)
        x = x + self.gamma1 * self.attn(self.norm1(x), earlier)
        image = to_map(x, self.side, self.side)
        summary = None if self.summary is None else to_tokens(self.summary(image))
        x = to_tokens(self.mix(image))
        return x + self.gamma2 * self.mlp(self.mlp_norm(self.norm2(x))), summary


class FcaStage(nn.Module):
    """Blocks of which each sees summaries of all before it: (N, C, H, W) to the same."""

    def __init__(self, dim: int, depth: int, heads: int, side: int) -> None:
        super().__init__()
        self.side = side
        one = (-(-side // 4)) ** 2
        self.blocks = nn.ModuleList(
            FcaBlock(dim, heads, side, i * one, summary=i < depth - 1) for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = to_tokens(x)
        summaries: list[Tensor] = []
        for block in self.blocks:
            earlier = torch.cat(summaries, dim=1) if summaries else None
            x, summary = block(x, earlier)
            if summary is not None:
                summaries.append(summary)
        return to_map(x, self.side, self.side)


class FcaFormer(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(
        self,
        dims: tuple[int, ...],
        depths: tuple[int, ...],
        heads: tuple[int, int],
        num_classes: int,
        img_size: int,
    ) -> None:
        super().__init__()
        half = dims[0] // 2
        layers: list[nn.Module] = [
            nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.GELU(),
            nn.Conv2d(half, dims[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(dims[0]),
        ]
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if stage:
                layers.append(_downsample(dims[stage - 1], dim))
            if stage < 2:
                layers += [ConvBlock(dim) for _ in range(depth)]
            else:
                side = img_size // 2 ** (stage + 2)
                layers.append(FcaStage(dim, depth, heads[stage - 2], side))
        self.features = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.norm(self.features(x).mean((2, 3))))
        return scores


def _downsample(dim: int, out: int) -> nn.Sequential:
    """PW BN GELU DW3 s2 BN GELU PW BN: (N, C, H, W) to (N, C', H/2, W/2)."""
    return nn.Sequential(
        nn.Conv2d(dim, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.GELU(),
        nn.Conv2d(out, out, 3, stride=2, padding=1, groups=out, bias=False),
        nn.BatchNorm2d(out),
        nn.GELU(),
        nn.Conv2d(out, out, 1, bias=False),
        nn.BatchNorm2d(out),
    )


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A checkpoint of another image size, its tables of positions resized (bilinear)."""
    resized = dict(state)
    for prefix, block in module.named_modules():
        if not isinstance(block, FcaBlock):
            continue
        before = int(prefix.rsplit(".", 1)[1])  # maps of earlier blocks, one after the other
        tables = {"attn.attention_biases": 1, "attn.earlier_biases": before}
        for name, maps in {**tables, "earlier_scale": before}.items():
            table = state.get(f"{prefix}.{name}")
            if table is not None and maps:
                wanted = block.get_parameter(name)
                resized[f"{prefix}.{name}"] = _resize(table, wanted, maps)
    return resized


def _resize(table: Tensor, wanted: Tensor, maps: int) -> Tensor:
    """A table of ``maps`` square maps for each head, with maps as large as those of ``wanted``."""
    heads = wanted.shape[0]
    old, new = (math.isqrt(t.numel() // (heads * maps)) for t in (table, wanted))
    if old == new:
        return table
    grid = table.reshape(heads, maps, old, old)
    return F.interpolate(grid, (new, new), mode="bilinear").reshape(wanted.shape)


@register_backbone(
    "FcaFormer",
    {
        "fcaformer_l1": Variant(paper_name="FcaFormer-L1", params_m=6.19, headline=True),
        "fcaformer_l2": Variant(paper_name="FcaFormer-L2", params_m=16.28),
        "fcaformer_l3": Variant(paper_name="FcaFormer-L3", params_m=27.89),
        "fcaformer_l4": Variant(paper_name="FcaFormer-L4", params_m=65.64),
    },
    doc=25,
)
def fcaformer(variant: str, *, num_classes: int, img_size: int) -> FcaFormer:
    """FcaFormer of one size; ``img_size`` is a multiple of 32.

    Its tables of positions have the size's length; ``checkpoint_filter_fn`` resizes trained ones.
    """
    check_side("FcaFormer", img_size)
    dims, depths, heads = _SIZES[variant]
    return FcaFormer(dims, depths, heads, num_classes, img_size)
