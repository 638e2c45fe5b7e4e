"""RMT: Fan et al., *RMT: Retentive Networks Meet Vision Transformers* (CVPR 2024).

Modules are named as in the official checkpoints. Those also carry the tables of angles and
decays, which are constants here: ``checkpoint_filter_fn`` leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["RMT", "checkpoint_filter_fn", "rmt"]

_HEAD_WIDTH = 1024
_FIRST_DECAY = 2.0  # the fastest head forgets a quarter per pixel: log(1 - 2^-2)


@dataclass(frozen=True)
class _Size:
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    ratios: tuple[int, ...]
    ranges: tuple[int, ...]  # how far apart the heads' decays are
    along_axes: int  # the first stages attend along rows and columns, the others over the map
    scaled_from: int = 4  # first stage with layer scale


_SIZES = {
    "rmt_t": _Size((64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (3, 3, 3, 3), (4, 4, 6, 6), 2),
    "rmt_s": _Size(
        (64, 128, 256, 512), (3, 4, 18, 4), (4, 4, 8, 16), (4, 4, 3, 3), (4, 4, 6, 6), 3
    ),
    "rmt_b": _Size(
        (80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (4, 4, 3, 3), (5, 5, 6, 6), 3, 2
    ),
    "rmt_l": _Size(
        (112, 224, 448, 640), (4, 8, 25, 8), (7, 7, 14, 20), (4, 4, 3, 3), (6, 6, 6, 6), 3, 2
    ),
}


class DWConv2d(nn.Module):
    """Depthwise convolution on (N, H, W, C)."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return y


class ManhattanAttention(nn.Module):
    """Attention that decays with Manhattan distance (eq. 4 to 7): (N, H, W, C) to the same.

    The decay gamma^(|dx| + |dy|) is applied here as the official code does: its logarithm is added
    to the scores before the softmax. ``along_axes`` attends along each row and then along each
    column (eq. 6), else over the whole map.
    """

    sin: Tensor
    cos: Tensor
    decay: Tensor

    def __init__(self, dim: int, heads: int, side: int, spread: int, *, along_axes: bool) -> None:
        super().__init__()
        self.heads, self.along_axes = heads, along_axes
        self.scale = (dim // heads) ** -0.5
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DWConv2d(dim, 5)
        self.out_proj = nn.Linear(dim, dim)
        sin, cos = _rotation(side, dim // heads)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("cos", cos, persistent=False)
        decay = _decay(heads, side, spread, whole=not along_axes)
        self.register_buffer("decay", decay, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x) * self.scale, self.v_proj(x)
        local = self.lepe(v)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in (q, k, v))  # (N, H, W, heads, d)
        q, k = self._rotate(q), self._rotate(k)
        mixed = self._along_axes(q, k, v) if self.along_axes else self._whole(q, k, v)
        y: Tensor = self.out_proj(mixed.flatten(3) + local)
        return y

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary position (RoFormer, eq. 34), neighbouring channels being a pair."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.cos + torch.stack((-odd, even), dim=-1).flatten(-2) * self.sin

    def _whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, height, width, _, _ = q.shape
        q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        attention = (q @ k.transpose(-2, -1) + self.decay).softmax(-1)
        out: Tensor = (attention @ v).transpose(1, 2).unflatten(1, (height, width))
        return out

    def _along_axes(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # rows: (N, H, heads, W, d); columns: (N, W, heads, H, d)
        rows = q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2) + self.decay
        v = rows.softmax(-1) @ v.transpose(2, 3)
        columns = q.permute(0, 2, 3, 1, 4) @ k.permute(0, 2, 3, 4, 1) + self.decay
        v = columns.softmax(-1) @ v.permute(0, 3, 2, 1, 4)
        return v.permute(0, 3, 1, 2, 4)


def _rotation(side: int, width: int) -> tuple[Tensor, Tensor]:
    """Sines and cosines, (H, W, 1, d): the angle grows with the position in row-major order."""
    rate = 10000.0 ** -torch.linspace(0, 1, width // 2).double()
    angle = torch.outer(torch.arange(side * side).double(), rate.repeat_interleave(2))
    angle = angle.view(side, side, 1, width)
    return angle.sin().float(), angle.cos().float()


def _decay(heads: int, side: int, spread: int, *, whole: bool) -> Tensor:
    """Logarithms of the decay between positions: (heads, HW, HW), or (heads, side, side)."""
    rate = torch.log(1 - 2.0 ** (-_FIRST_DECAY - spread * torch.arange(heads) / heads))
    position = torch.arange(side)
    if whole:
        rows, columns = torch.meshgrid(position, position, indexing="ij")
        place = torch.stack((rows.flatten(), columns.flatten()), dim=-1)
    else:
        place = position.unsqueeze(-1)
    distance = (place.unsqueeze(1) - place.unsqueeze(0)).abs().sum(-1)
    return rate.view(-1, 1, 1) * distance


class FeedForward(nn.Module):
    """Linear, GELU, a depthwise 3x3 added, linear: (N, H, W, C) to the same."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = DWConv2d(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        x = self.fc2(x + self.dwconv(x))
        return x


class RetBlock(nn.Module):
    """``x += DW3(x); x += attention(LN x); x += FFN(LN x)`` on (N, H, W, C)."""

    def __init__(self, attention: ManhattanAttention, dim: int, ratio: int, scaled: bool) -> None:
        super().__init__()
        self.pos = DWConv2d(dim, 3)
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.retention = attention
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FeedForward(dim, ratio * dim)
        self.scaled = scaled
        if scaled:
            self.gamma_1 = nn.Parameter(1e-6 * torch.ones(1, 1, 1, dim))
            self.gamma_2 = nn.Parameter(1e-6 * torch.ones(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        y = self.retention(self.retention_layer_norm(x))
        x = x + (self.gamma_1 * y if self.scaled else y)
        y = self.ffn(self.final_layer_norm(x))
        out: Tensor = x + (self.gamma_2 * y if self.scaled else y)
        return out


class PatchMerging(nn.Module):
    """Halves the map by a strided convolution: (N, H, W, C) to (N, H/2, W/2, C')."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return y


class Stage(nn.Module):
    """Blocks at one resolution, then the step to the next where there is one."""

    def __init__(self, blocks: list[RetBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Four convolutions: (N, 3, S, S) to (N, S/4, S/4, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        steps = ((3, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1))
        layers: list[nn.Module] = []
        for before, after, stride in steps:
            conv = nn.Conv2d(before, after, 3, stride=stride, padding=1)
            layers += [conv, nn.BatchNorm2d(after), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x).permute(0, 2, 3, 1)
        return y


class RMT(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(size.dims[0])
        self.layers = nn.ModuleList()
        for stage, dim in enumerate(size.dims):
            side, heads = img_size // 2 ** (stage + 2), size.heads[stage]
            along_axes, scaled = stage < size.along_axes, stage >= size.scaled_from
            blocks = [
                RetBlock(
                    ManhattanAttention(dim, heads, side, size.ranges[stage], along_axes=along_axes),
                    dim,
                    size.ratios[stage],
                    scaled,
                )
                for _ in range(size.depths[stage])
            ]
            down = PatchMerging(dim, size.dims[stage + 1]) if stage < 3 else None
            self.layers.append(Stage(blocks, down))
        self.proj = nn.Linear(size.dims[-1], _HEAD_WIDTH)
        self.norm = nn.BatchNorm2d(_HEAD_WIDTH)
        self.head = nn.Linear(_HEAD_WIDTH, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        x = F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """An official checkpoint without its tables of angles and decays."""
    del module
    return {name: tensor for name, tensor in state.items() if ".Relpos." not in name}


@register_backbone(
    "RMT",
    {
        "rmt_t": Variant(paper_name="RMT-T", params_m=14.33, headline=True),
        "rmt_s": Variant(paper_name="RMT-S", params_m=26.97),
        "rmt_b": Variant(paper_name="RMT-B", params_m=54.15),
        "rmt_l": Variant(paper_name="RMT-L", params_m=95.46),
    },
    doc=112,
)
def rmt(variant: str, *, num_classes: int, img_size: int) -> RMT:
    """RMT of one size; ``img_size`` is a multiple of 32. No weight depends on it."""
    check_side("RMT", img_size)
    return RMT(_SIZES[variant], num_classes, img_size)
