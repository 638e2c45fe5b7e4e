"""SG-Former: Ren et al., *SG-Former: Self-guided Transformer with Evolving Token Reallocation*
(ICCV 2023).

Blocks come in pairs. The first attends to a small map of the whole and to windows, and its two
attentions tell how significant each token is. The second groups the tokens by that and merges
each group at a rate of its own, so that significant tokens give more keys.

After the paper where it leaves a choice: each window's and the small map's attentions are averaged
over heads and queries, and the small map is repeated to the full size; members of a group are
merged with those before and after them in rows (half the heads) or in columns (the others); the
MLP has a depthwise convolution, as in Ren et al., *Shunted Self-Attention* (CVPR 2022).
How the official checkpoints name their layers isn't established, so they are not converted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.windows import cut_windows, join_windows
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["GuidedAttention", "HybridAttention", "SGFormer", "grouped_order", "sgformer"]

_WINDOW = 7
_RATIO = 4
_REDUCTIONS = (8, 4, 2)  # side of the map over that of the small map, stages 1 to 3
# tokens merged into one, from the least significant group to the most, and the groups' shares
_MERGED = ((196, 56, 28), (49, 14, 7), (2, 1))
_SHARES = ((1, 2, 1), (1, 2, 1), (1, 1))


@dataclass(frozen=True)
class _Size:
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]


_SIZES = {
    "sgformer_s": _Size(64, (2, 4, 16, 1), (2, 4, 8, 16)),
    "sgformer_m": _Size(64, (2, 6, 28, 2), (2, 4, 8, 16)),
    "sgformer_b": _Size(96, (4, 6, 24, 2), (4, 6, 12, 24)),
}


def _split(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(N, L, parts · D) to as many of (N, heads, L, D / heads)."""
    cut: tuple[Tensor, ...] = x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return cut


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's result (N, L, heads · d), and its weights (N, heads, L, keys)."""
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class LocalEnhancement(nn.Module):
    """LePE: a depthwise 3x3 convolution of a linear layer; (N, L, C) to itself."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.linear = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.conv(to_map(self.linear(x), self.side, self.side)))


class HybridAttention(nn.Module):
    """Hybrid-scale attention: half the heads see a map ``reduction`` times
    smaller, half see windows of 7x7.

    (N, L, C) to the same, and the tokens' significance (N, L): what a token, or the place of the
    small map that it belongs to, is given by its queries on average. Both sum to one over 49 keys.
    """

    def __init__(self, dim: int, heads: int, side: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.side, self.reduction = heads // 2, side, reduction
        self.sr = nn.Conv2d(dim, dim, reduction, reduction)
        self.norm = nn.LayerNorm(dim)
        self.q1 = nn.Linear(dim, dim // 2)
        self.kv1 = nn.Linear(dim, dim)
        self.q2 = nn.Linear(dim, dim // 2)
        self.kv2 = nn.Linear(dim, dim)
        self.lepe = LocalEnhancement(dim, side)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        side, small = self.side, self.side // self.reduction
        places = self.norm(to_tokens(self.sr(to_map(x, side, side))))
        (q,) = _split(self.q1(x), 1, self.heads)
        k, v = _split(self.kv1(places), 2, self.heads)
        wide, weights = _attend(q, k, v)
        seen = weights.mean((1, 2)).unflatten(1, (1, small, small))
        significance = F.interpolate(seen, scale_factor=self.reduction, mode="nearest").flatten(1)

        window = (_WINDOW, _WINDOW)
        inside = cut_windows(x.unflatten(1, (side, side)), window).flatten(1, 2)
        (q,) = _split(self.q2(inside), 1, self.heads)
        k, v = _split(self.kv2(inside), 2, self.heads)
        near, weights = _attend(q, k, v)
        near = join_windows(near.unflatten(1, window), (side, side)).flatten(1, 2)
        seen = weights.mean((1, 2)).unflatten(1, (*window, 1))
        seen = join_windows(seen, (side, side)).flatten(1)

        out: Tensor = self.proj(torch.cat((wide, near), dim=-1) + self.lepe(x))
        return out, (significance + seen) / 2


def grouped_order(significance: Tensor, bounds: tuple[int, ...], place: Tensor) -> Tensor:
    """The tokens' order by group, and by ``place`` inside a group; int64 (N, L).

    ``significance``: (N, L). Groups are cut from the tokens ranked by it, at ``bounds``. Only who
    crosses a bound changes the result, not the ranks inside a group. ``place``: int64 (L,).
    """
    ranks = significance.argsort(dim=1, stable=True).argsort(dim=1)
    group = sum(((ranks >= bound).long() for bound in bounds), torch.zeros_like(ranks))
    return (group * place.numel() + place).argsort(dim=1)


class GuidedAttention(nn.Module):
    """Self-guided attention: (N, L, C), significance (N, L) to (N, L, C)."""

    rows: Tensor
    columns: Tensor

    def __init__(self, dim: int, heads: int, side: int, stage: int) -> None:
        super().__init__()
        self.heads = heads // 2
        shares, length = _SHARES[stage], side * side
        self.sizes = [length * share // sum(shares) for share in shares]
        self.bounds = tuple(sum(self.sizes[:i]) for i in range(1, len(shares)))
        places = torch.arange(length).unflatten(0, (side, side))
        self.register_buffer("rows", places.flatten(), persistent=False)
        self.register_buffer("columns", places.T.flatten(), persistent=False)
        self.merges = nn.ModuleList(nn.Linear(count, 1) for count in _MERGED[stage])
        self.q = nn.Linear(dim, dim)
        self.kv1 = nn.Linear(dim, dim)
        self.kv2 = nn.Linear(dim, dim)
        self.lepe = LocalEnhancement(dim, side)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, significance: Tensor) -> Tensor:
        (q,) = _split(self.q(x), 1, 2 * self.heads)
        parts = []
        for queries, kv, place in zip(
            q.split(self.heads, dim=1), (self.kv1, self.kv2), (self.rows, self.columns), strict=True
        ):
            order = grouped_order(significance, self.bounds, place)
            k, v = _split(kv(self._merge(x, order)), 2, self.heads)
            parts.append(_attend(queries, k, v)[0])
        out: Tensor = self.proj(torch.cat(parts, dim=-1) + self.lepe(x))
        return out

    def _merge(self, x: Tensor, order: Tensor) -> Tensor:
        """The tokens (N, L, C) in that order, merged to (N, keys, C)."""
        x = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1])).transpose(1, 2)
        merged = [
            merge(group.unflatten(2, (-1, merge.in_features))).squeeze(-1)
            for group, merge in zip(x.split(self.sizes, dim=2), self.merges, strict=True)
            if isinstance(merge, nn.Linear)
        ]
        return torch.cat(merged, dim=2).transpose(1, 2)


class FullAttention(nn.Module):
    """Ordinary attention with LePE; (N, L, C) to itself."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.lepe = LocalEnhancement(dim, side)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        (q,) = _split(self.q(x), 1, self.heads)
        k, v = _split(self.kv(x), 2, self.heads)
        out: Tensor = self.proj(_attend(q, k, v)[0] + self.lepe(x))
        return out


class ConvMlp(nn.Module):
    """Linear to 4 C, ``GELU(h + DW3(h))``, linear; (N, L, C) to itself."""

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.fc1 = nn.Linear(dim, _RATIO * dim)
        self.dwconv = nn.Conv2d(_RATIO * dim, _RATIO * dim, 3, padding=1, groups=_RATIO * dim)
        self.fc2 = nn.Linear(_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x + to_tokens(self.dwconv(to_map(x, self.side, self.side)))
        x = self.fc2(F.gelu(x))
        return x


class Block(nn.Module):
    """``x += attention(LN x); x += MLP(LN x)`` with one of the three attentions.

    Tokens (N, L, C) and their significance (N, L) to the same; a hybrid block makes a new one.
    """

    def __init__(self, attention: nn.Module, dim: int, side: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvMlp(dim, side)

    def forward(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm1(x)
        if isinstance(self.attn, HybridAttention):
            y, significance = self.attn(y)
        elif isinstance(self.attn, GuidedAttention):
            y = self.attn(y, significance)
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x)), significance


def _stem(dim: int) -> nn.Sequential:
    """(N, 3, S, S) to (N, C, S / 4, S / 4)."""
    return nn.Sequential(
        nn.Conv2d(3, dim, 3, stride=2, padding=1),
        nn.GroupNorm(1, dim),
        nn.GELU(),
        nn.Conv2d(dim, dim, 3, padding=1),
        nn.GroupNorm(1, dim),
        nn.GELU(),
        nn.Conv2d(dim, dim, 3, stride=2, padding=1),
        nn.GroupNorm(1, dim),
    )


def _halve(dim: int) -> nn.Sequential:
    """(N, C, H, W) to (N, 2 C, H / 2, W / 2)."""
    out = 2 * dim
    return nn.Sequential(
        nn.Conv2d(dim, out, 1),
        nn.GroupNorm(1, out),
        nn.GELU(),
        nn.Conv2d(out, out, 3, stride=2, padding=1, groups=out),
        nn.GroupNorm(1, out),
        nn.GELU(),
        nn.Conv2d(out, out, 1),
        nn.GroupNorm(1, out),
    )


def _positions(dim: int, side: int) -> Tensor:
    """Sines and cosines of row and column (Vaswani et al. 2017, section 3.5); (1, side², C)."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * rates  # (side, C / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows = axis[:, None].expand(-1, side, -1)
    columns = axis[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1).unsqueeze(0)


class SGFormer(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.sides = [img_size // 2 ** (stage + 2) for stage in range(4)]
        self.embeds, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage, (side, depth, heads) in enumerate(
            zip(self.sides, size.depths, size.heads, strict=True)
        ):
            dim = size.width * 2**stage
            self.embeds.append(_halve(dim // 2) if stage else _stem(dim))
            attentions: list[nn.Module] = []
            for index in range(depth):
                if stage == 3:
                    attentions.append(FullAttention(dim, heads, side))
                elif index % 2 == 0:
                    attentions.append(HybridAttention(dim, heads, side, _REDUCTIONS[stage]))
                else:
                    attentions.append(GuidedAttention(dim, heads, side, stage))
            self.stages.append(nn.ModuleList(Block(a, dim, side) for a in attentions))
        # fixed, but a parameter: the published numbers count it
        table = _positions(size.width, self.sides[0])
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.norm = nn.LayerNorm(8 * size.width)
        self.head = nn.Linear(8 * size.width, num_classes)
        self.apply(draw_weights)
        for layer in self.modules():
            if isinstance(layer, GuidedAttention):  # merges begin as means
                for merge in layer.merges:
                    assert isinstance(merge, nn.Linear)
                    nn.init.constant_(merge.weight, 1 / merge.in_features)

    def forward(self, x: Tensor) -> Tensor:
        for index, (embed, blocks, side) in enumerate(
            zip(self.embeds, self.stages, self.sides, strict=True)
        ):
            x = to_tokens(embed(x))
            if index == 0:
                x = x + self.pos_embed
            assert isinstance(blocks, nn.ModuleList)
            significance = x[:, :, 0]  # of no block yet: the first of a stage makes its own
            for block in blocks:
                x, significance = block(x, significance)
            if index < 3:
                x = to_map(x, side, side)
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


@register_backbone(
    "SG-Former",
    {
        "sgformer_s": Variant(
            paper_name="SG-Former-S (after the paper)",
            also=("sg_former_s",),
            params_m=22.55,
            headline=True,
        ),
        "sgformer_m": Variant(
            paper_name="SG-Former-M (after the paper)", also=("sg_former_m",), params_m=38.69
        ),
        "sgformer_b": Variant(
            paper_name="SG-Former-B (after the paper)", also=("sg_former_b",), params_m=77.95
        ),
    },
    doc=89,
)
def sgformer(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build an SG-Former; sizes are multiples of 224 pixels (windows and groups are not padded)."""
    check_side("SG-Former", img_size, multiple=224)
    return SGFormer(_SIZES[variant], num_classes, img_size)
