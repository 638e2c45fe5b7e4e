"""TransNeXt: Shi, *TransNeXt: Robust Foveal Visual Perception for Vision Transformers* (CVPR
2024).

Modules are named as in the official checkpoints, which load as they are. Position biases come
from a small network over constants; ``reparameterize`` computes them once, for deployment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["TransNeXt", "transnext"]

_NEIGHBOURS = 9
_MASKED = -100.0  # a score whose exponential is nothing, and which a quantiser can live with
_TRAINED_SIDE = 224
_RATIOS = (8, 8, 4, 4)
_POOLING = (8, 4, 2, 1)
# width, depths, heads of the first stage (24 channels each)
_SIZES = {
    "transnext_micro": (48, (2, 2, 15, 2), 2),
    "transnext_tiny": (72, (2, 2, 15, 2), 3),
    "transnext_small": (72, (5, 5, 22, 5), 3),
    "transnext_base": (96, (5, 5, 23, 5), 4),
}


@dataclass(frozen=True)
class _Geometry:
    """What the positions of a stage give: shared by its blocks.

    ``coordinates`` (U, 2) are the distances that occur, on a log scale; ``places`` (HW · P) says
    which of them lies between each position and each pooled one.
    """

    side: int
    pooling: int
    coordinates: Tensor
    places: Tensor


def _geometry(side: int, pooling: int, trained: int) -> _Geometry:
    """Relative positions of a map's pixels and their pooled means (eq. 13 and Swin V2, eq. 4).

    ``trained`` is the side of the map at pre-training, which distances are measured by.
    """
    pixel = np.arange(side, dtype=np.float64)
    pooled = pixel.reshape(-1, pooling).mean(1)
    distances, place = np.unique(pixel[:, None] - pooled, return_inverse=True)
    place = place.reshape(side, -1)
    count = len(distances)
    places = place[:, None, :, None] * count + place[None, :, None, :]
    scaled = distances * 8 / max(trained - 1, 1)
    logarithms = np.sign(scaled) * np.log2(np.abs(scaled) + 1) / 3
    grid = np.stack(np.meshgrid(logarithms, logarithms, indexing="ij"), axis=-1)
    return _Geometry(
        side,
        pooling,
        _constant(grid.reshape(-1, 2).astype(np.float32)),
        _constant(places.reshape(-1)),
    )


def _constant(array: np.ndarray) -> Tensor:
    """The array as a tensor on the device where tensors are made just now."""
    given = torch.from_numpy(array)
    return torch.empty(given.shape, dtype=given.dtype).copy_(given)


class PositionBias(nn.Module):
    """Continuous position bias: an MLP of log-spaced distances (Swin V2, section 3.3).

    A part of its attention by inheritance, because checkpoints name its layers there.
    """

    bias_table: Tensor | None
    coordinates: Tensor
    places: Tensor

    def __init__(self, heads: int, geometry: _Geometry) -> None:
        super().__init__()
        self.heads, self.side, self.pooling = heads, geometry.side, geometry.pooling
        self.pooled = (geometry.side // geometry.pooling) ** 2
        self.cpb_fc1: nn.Module = nn.Linear(2, 512)
        self.cpb_fc2: nn.Module = nn.Linear(512, heads)
        self.register_buffer("coordinates", geometry.coordinates, persistent=False)
        self.register_buffer("places", geometry.places, persistent=False)
        self.register_buffer("bias_table", None)

    def position_bias(self) -> Tensor:
        """Float32 (heads, HW, pooled positions)."""
        if self.bias_table is not None:
            return self.bias_table
        table = self.cpb_fc2(F.relu(self.cpb_fc1(self.coordinates))).transpose(0, 1)
        out: Tensor = table.index_select(1, self.places).view(self.heads, -1, self.pooled)
        return out

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Compute the bias, and drop the network that gives it."""
        if self.bias_table is None:
            self.bias_table = self.position_bias().contiguous()
            self.cpb_fc1, self.cpb_fc2 = nn.Identity(), nn.Identity()


def _fresh_temperature(heads: int) -> Tensor:
    """What softplus makes 1 / 0.24 of, for every head."""
    return torch.full((heads, 1, 1), math.log(math.expm1(1 / 0.24)))


class AggregatedAttention(PositionBias):
    """Each position attends to its 3x3 neighbours and to a pooled map, in one softmax.

    (N, HW, C) to the same; paper, section 3.2 and eq. 8 to 12. Scores are cosines, times a
    learned temperature and the logarithm of the number of keys; a learned query joins each query.
    """

    length_scale: Tensor
    outside: Tensor

    def __init__(self, dim: int, heads: int, geometry: _Geometry) -> None:
        super().__init__(heads, geometry)
        width = dim // heads
        self.temperature = nn.Parameter(_fresh_temperature(heads))
        self.q = nn.Linear(dim, dim)
        self.query_embedding = nn.Parameter(torch.randn(heads, 1, width) * 0.02)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.relative_pos_bias_local = nn.Parameter(torch.randn(heads, _NEIGHBOURS) * 0.0004)
        self.learnable_tokens = nn.Parameter(torch.randn(heads, width, _NEIGHBOURS) * 0.02)
        self.learnable_bias = nn.Parameter(torch.zeros(heads, 1, _NEIGHBOURS))
        inside = F.unfold(torch.ones(1, 1, self.side, self.side), 3, padding=1)[0].T
        scale = torch.log(inside.sum(1, keepdim=True) + self.pooled)
        self.register_buffer("length_scale", scale, persistent=False)
        self.register_buffer("outside", (1 - inside) * _MASKED, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self._heads(self.q(x)), dim=-1)
        scaled = (q + self.query_embedding) * (F.softplus(self.temperature) * self.length_scale)
        near_k, near_v = self._neighbours(x)
        near = (scaled.unsqueeze(-2) @ near_k).squeeze(-2)
        near = near + (self.relative_pos_bias_local.unsqueeze(1) + self.outside)
        far_k, far_v = self._pooled(x)
        far = scaled @ F.normalize(far_k, dim=-1).transpose(-2, -1) + self.position_bias()
        attention = torch.cat((near, far), dim=-1).softmax(-1)
        near, far = attention.split((_NEIGHBOURS, self.pooled), dim=-1)
        near = q @ self.learnable_tokens + self.learnable_bias + near
        y = (near.unsqueeze(-2) @ near_v.transpose(-2, -1)).squeeze(-2) + far @ far_v
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(N, L, C) to (N, heads, L, d)."""
        out: Tensor = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return out

    def _neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values around each position, (N, heads, HW, d, 9) each."""
        k, v = self.kv(x).chunk(2, dim=-1)
        k = F.normalize(k.unflatten(-1, (self.heads, -1)), dim=-1).flatten(2)
        maps = to_map(torch.cat((k, v), dim=-1), self.side, self.side)
        around = F.unfold(maps, 3, padding=1)
        around = around.unflatten(1, (2 * self.heads, -1, _NEIGHBOURS)).permute(0, 1, 4, 2, 3)
        k, v = around.chunk(2, dim=1)
        return k, v

    def _pooled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the pooled map, (N, heads, P, d) each."""
        x = F.gelu(self.sr(to_map(x, self.side, self.side)))
        x = self.norm(to_tokens(F.avg_pool2d(x, self.pooling)))
        k, v = self.kv(x).chunk(2, dim=-1)
        return self._heads(k), self._heads(v)


class CosineAttention(PositionBias):
    """Attention over the whole map with scaled cosines: (N, HW, C) to the same (last stage)."""

    def __init__(self, dim: int, heads: int, geometry: _Geometry) -> None:
        super().__init__(heads, geometry)
        self.length_scale = math.log(self.pooled)
        self.temperature = nn.Parameter(_fresh_temperature(heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_embedding = nn.Parameter(torch.randn(heads, 1, dim // heads) * 0.02)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = F.normalize(split[0], dim=-1), F.normalize(split[1], dim=-1), split[2]
        q = (q + self.query_embedding) * (F.softplus(self.temperature) * self.length_scale)
        attention = (q @ k.transpose(-2, -1) + self.position_bias()).softmax(-1)
        y: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return y


class _Depthwise(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)


class ConvGLU(nn.Module):
    """Gated linear unit whose gate sees its neighbours, ``GELU(DW3(a)) v`` (section 3.4)."""

    def __init__(self, dim: int, hidden: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.fc1 = nn.Linear(dim, 2 * hidden)
        self.dwconv = _Depthwise(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        gate = to_tokens(self.dwconv.dwconv(to_map(gate, self.side, self.side)))
        x = self.fc2(F.gelu(gate) * value)
        return x


class Block(nn.Module):
    """``x += attention(LN x); x += ConvGLU(LN x)`` on (N, HW, C)."""

    def __init__(self, dim: int, heads: int, ratio: int, geometry: _Geometry) -> None:
        super().__init__()
        attention = CosineAttention if geometry.pooling == 1 else AggregatedAttention
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, heads, geometry)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, int(2 * ratio * dim / 3), geometry.side)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class OverlapPatchEmbed(nn.Module):
    """A strided convolution of overlapping patches, and LN: (N, C, H, W) to (N, HW / s², C')."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, kernel, stride=stride, padding=kernel // 2)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(to_tokens(self.proj(x)))
        return x


class TransNeXt(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(
        self, width: int, depths: tuple[int, ...], heads: int, num_classes: int, img_size: int
    ) -> None:
        super().__init__()
        self.sides = [img_size // 2 ** (stage + 2) for stage in range(4)]
        before = 3
        for stage, (depth, side) in enumerate(zip(depths, self.sides, strict=True)):
            dim, count = width * 2**stage, heads * 2**stage
            trained = _TRAINED_SIDE // 2 ** (stage + 2)
            geometry = _geometry(side, _POOLING[stage], trained)
            embed = OverlapPatchEmbed(before, dim, *((3, 2) if stage else (7, 4)))
            blocks = [Block(dim, count, _RATIOS[stage], geometry) for _ in range(depth)]
            self.add_module(f"patch_embed{stage + 1}", embed)
            self.add_module(f"block{stage + 1}", nn.Sequential(*blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=1e-6))
            before = dim
        self.head = nn.Linear(before, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for stage, side in enumerate(self.sides, 1):
            x = self.get_submodule(f"patch_embed{stage}")(x)
            x = self.get_submodule(f"norm{stage}")(self.get_submodule(f"block{stage}")(x))
            if stage < len(self.sides):
                x = to_map(x, side, side)
        scores: Tensor = self.head(x.mean(1))
        return scores


@register_backbone(
    "TransNeXt",
    {
        "transnext_micro": Variant(paper_name="TransNeXt-Micro", params_m=12.81),
        "transnext_tiny": Variant(paper_name="TransNeXt-Tiny", params_m=28.26, headline=True),
        "transnext_small": Variant(paper_name="TransNeXt-Small", params_m=49.74),
        "transnext_base": Variant(paper_name="TransNeXt-Base", params_m=89.72),
    },
    licence="apache-2.0",
    doc=109,
)
def transnext(variant: str, *, num_classes: int, img_size: int) -> TransNeXt:
    """TransNeXt of one size; ``img_size`` is a multiple of 32. No weight depends on it."""
    check_side("TransNeXt", img_size)
    width, depths, heads = _SIZES[variant]
    return TransNeXt(width, depths, heads, num_classes, img_size)
