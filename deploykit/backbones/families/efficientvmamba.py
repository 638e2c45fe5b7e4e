"""EfficientVMamba: Pei et al., *EfficientVMamba: Atrous Selective Scan for Light Weight Visual
Mamba* (AAAI 2025).

The scan's modules are named as in VMamba. How the official checkpoints name the rest isn't
established here, so that they may not load. The scan is written with log2(L) steps of plain
operators (``layers/selective_scan.py``): no CUDA extension, and it exports.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.selective_scan import draw_scan_parameters, selective_scan
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["EfficientVMamba", "efficientvmamba"]

_STATE = 16
# width, depths
_SIZES = {
    "efficientvmamba_t": (48, (2, 2, 4, 2)),
    "efficientvmamba_s": (64, (2, 2, 4, 2)),
    "efficientvmamba_b": (96, (2, 2, 9, 2)),
}


class AtrousScan(nn.Module):
    """Efficient 2D scan (paper, section 3.2): (N, H, W, C) to the same, H and W even.

    Each of the four directions of VMamba's SS2D sees every second row and column: a sequence of
    HW / 4 instead of HW. The sub-maps are put together again afterwards.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner, self.rank = 2 * dim, -(-dim // 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.x_proj_weight = nn.Parameter(torch.empty(4, self.rank + 2 * _STATE, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, _STATE))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        draw_scan_parameters(
            self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs
        )

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        y = self.out_norm(self._scan(x).permute(0, 2, 3, 1)) * F.silu(z)
        out: Tensor = self.out_proj(y)
        return out

    def _scan(self, x: Tensor) -> Tensor:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        # (N, D, h, row parity, w, column parity): grid (row, column) in order 00, 10, 01, 11
        split = x.unflatten(3, (width, 2)).unflatten(2, (height, 2))
        rows = (split[:, :, :, 0, :, 0], split[:, :, :, 0, :, 1])
        columns = (split[:, :, :, 1, :, 0], split[:, :, :, 1, :, 1])
        along_rows = [grid.flatten(2) for grid in rows]
        along_columns = [grid.transpose(2, 3).flatten(2) for grid in columns]
        sequences = torch.stack(
            (along_rows[0], along_columns[0], along_rows[1], along_columns[1]), dim=1
        )
        step, b, c = (self.x_proj_weight @ sequences).split((self.rank, _STATE, _STATE), dim=2)
        step = F.softplus(self.dt_projs_weight @ step + self.dt_projs_bias.unsqueeze(-1))
        a = -torch.exp(self.A_logs).unflatten(0, (4, -1))
        y = selective_scan(sequences, step, a, b, c, self.Ds.unflatten(0, (4, -1)))
        even = torch.stack([y[:, i].unflatten(2, (height, width)) for i in (0, 2)], dim=-1)
        odd = torch.stack(
            [y[:, i].unflatten(2, (width, height)).transpose(2, 3) for i in (1, 3)], dim=-1
        )
        # (N, D, h, w, column parity) twice, to (N, D, h, row parity, w, column parity)
        return torch.stack((even, odd), dim=3).flatten(4).flatten(2, 3)


class ChannelGate(nn.Module):
    """``x sigmoid(W2 GELU(W1 mean(LN x)))`` on (N, H, W, C): squeeze and excitation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.global_reduce = nn.Linear(dim, dim // 8)
        self.channel_select = nn.Linear(dim // 8, dim)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm(x).mean((1, 2), keepdim=True)
        out: Tensor = x * self.channel_select(F.gelu(self.global_reduce(mean))).sigmoid()
        return out


class ScanBlock(nn.Module):
    """``x += gate(scan(LN x)) + gate(conv(LN x))`` on (N, H, W, C), one gate for both (fig. 4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attention = AtrousScan(dim)
        self.conv_branch = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, 1),
        )
        self.se = ChannelGate(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        local = self.conv_branch(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.se(self.self_attention(y)) + self.se(local)
        return x


class InvertedBlock(nn.Module):
    """Inverted residual with squeeze and excitation (MobileNetV3) on (N, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 4 * dim
        act = timm.layers.ConvNormAct
        self.expand = act(dim, hidden, 1, act_layer=nn.ReLU)
        self.depthwise = act(hidden, hidden, 3, groups=hidden, act_layer=nn.ReLU)
        self.se = timm.layers.SqueezeExcite(hidden, rd_channels=hidden // 8)
        self.project = act(hidden, dim, 1, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.depthwise(self.expand(x.permute(0, 3, 1, 2))))
        out: Tensor = x + self.project(y).permute(0, 2, 3, 1)
        return out


class PatchMerging(nn.Module):
    """2x2 neighbours to one (Swin): (N, H, W, C) to (N, H/2, W/2, 2C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x = x.unflatten(2, (width // 2, 2)).unflatten(1, (height // 2, 2))
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # column parity outside, row parity inside
        x = self.reduction(self.norm(x))
        return x


class PatchEmbed(nn.Module):
    """(N, 3, S, S) to (N, S/4, S/4, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x


class Stage(nn.Module):
    """Blocks, then the merging of patches where another stage follows."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.downsample(x)
        return x


class EfficientVMamba(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(self, width: int, depths: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        dims = [width * 2**i for i in range(4)]
        self.patch_embed = PatchEmbed(width)
        self.layers = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            kind = ScanBlock if stage < 2 else InvertedBlock
            down: nn.Module = PatchMerging(dim) if stage < 3 else nn.Identity()
            self.layers.append(Stage([kind(dim) for _ in range(depth)], down))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.head(self.norm(x).mean((1, 2)))
        return scores


@register_backbone(
    "EfficientVMamba",
    {
        "efficientvmamba_t": Variant(paper_name="EfficientVMamba-T", params_m=6.49, headline=True),
        "efficientvmamba_s": Variant(paper_name="EfficientVMamba-S", params_m=11.27),
        "efficientvmamba_b": Variant(paper_name="EfficientVMamba-B", params_m=33.72),
    },
    doc=86,
)
def efficientvmamba(variant: str, *, num_classes: int, img_size: int) -> EfficientVMamba:
    """EfficientVMamba of one size; ``img_size`` is a multiple of 32.

    S is 64 wide, which gives the paper's 11 million; the repository's configuration says 96.
    """
    check_side("EfficientVMamba", img_size)
    width, depths = _SIZES[variant]
    return EfficientVMamba(width, depths, num_classes)
