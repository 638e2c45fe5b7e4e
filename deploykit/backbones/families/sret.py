"""SReT: Shen et al., *Sliced Recursive Transformer* (ECCV 2022).

Each set of block weights is used twice in a row. The second use of the first stage attends in two
groups of permuted tokens; published as a permutation drawn anew in every forward pass, even in
evaluation, it is drawn once here (from a fixed seed), for a deployed network must answer the same
question in the same way. How the authors' checkpoints name their tensors is not known here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.vit import SelfAttention
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["SReT", "checkpoint_filter_fn", "sret"]

_EPS = 1e-6
_WEIGHT_SETS = (2, 5, 3)
_GROUPS = (8, 4, 1)
_GROUPS_AGAIN = (2, 1, 1)  # in the second use of a set of weights
_SEED = 0  # of the permutations


class _Size(NamedTuple):
    width: int
    heads: tuple[int, int, int]
    mlp_ratio: float
    projection_ratio: float


_SIZES = {
    "sret_t": _Size(64, (2, 4, 8), 3.6, 1),
    "sret_lt": _Size(64, (2, 4, 8), 4.0, 1),
    "sret_s": _Size(126, (3, 6, 12), 3.0, 2),
}


class GroupAttention(SelfAttention):
    """Attention within groups of consecutive tokens; (N, L, C) to (N, L, C)."""

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        x = x.unflatten(1, (groups, -1))
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(2, 3).flatten(3).flatten(1, 2))
        return out


class Scaled(nn.Module):
    """``a x + b f(x)`` with learned scalars a and b."""

    def __init__(self) -> None:
        super().__init__()
        self.of_input = nn.Parameter(torch.ones(1))
        self.of_branch = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return self.of_input * x + self.of_branch * branch


class Block(nn.Module):
    """``x = a x + b attention(LN x); x = c x + d MLP(LN x)`` on (N, L, C)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = GroupAttention(dim, heads)
        self.scaled1 = Scaled()
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = timm.layers.Mlp(dim, int(dim * mlp_ratio))
        self.scaled2 = Scaled()

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        x = self.scaled1(x, self.attn(self.norm1(x), groups))
        x = self.scaled2(x, self.mlp(self.norm2(x)))
        return x


class Projection(nn.Module):
    """The non-linear projection after each block: ``a x + b MLP(LN x)`` on (N, L, C)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = timm.layers.Mlp(dim, int(dim * ratio))
        self.scaled = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(x, self.mlp(self.norm(x)))
        return x


class Recursion(nn.Module):
    """One set of block weights used twice, each use followed by a projection of its own.

    On (N, L, C). The second use takes tokens in a fixed random order where it has groups.
    """

    order: Tensor
    back: Tensor

    def __init__(
        self, dim: int, heads: int, size: _Size, groups: tuple[int, int], permutation: Tensor
    ) -> None:
        super().__init__()
        self.block = Block(dim, heads, size.mlp_ratio)
        self.projections = nn.ModuleList(Projection(dim, size.projection_ratio) for _ in range(2))
        self.groups, self.groups_again = groups
        self.register_buffer("order", permutation, persistent=False)
        self.register_buffer("back", permutation.argsort(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projections[0](self.block(x, self.groups))
        if self.groups_again > 1:
            x = x.index_select(1, self.order)
            x = self.block(x, self.groups_again).index_select(1, self.back)
        else:
            x = self.block(x, 1)
        x = self.projections[1](x)
        return x


class SReT(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 8, 16, 32."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        width = size.width
        stem: list[nn.Module] = []
        for dim, out in ((3, width // 2), (width // 2, width), (width, width)):
            stem += [nn.Conv2d(dim, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.side = img_size // 8
        self.pos_embed = nn.Parameter(torch.randn(1, width, self.side, self.side) * 0.02)
        generator = torch.Generator().manual_seed(_SEED)
        stages, pools = [], []
        for index, depth in enumerate(_WEIGHT_SETS):
            dim, tokens = width * 2**index, (self.side // 2**index) ** 2
            groups = (_GROUPS[index], _GROUPS_AGAIN[index])
            stages.append(
                nn.Sequential(
                    *(
                        Recursion(
                            dim, size.heads[index], size, groups,
                            torch.randperm(tokens, generator=generator, device="cpu"),
                        )
                        for _ in range(depth)
                    )
                )
            )  # fmt: skip
            if index:
                pools.append(nn.Conv2d(dim // 2, dim, 3, 2, 1, groups=dim // 2))
        self.stages, self.pools = nn.ModuleList(stages), nn.ModuleList(pools)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.head = nn.Linear(dim, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.pos_embed
        for index, stage in enumerate(self.stages):
            side = self.side // 2**index
            if index:
                x = self.pools[index - 1](to_map(x, 2 * side, 2 * side))
            x = stage(to_tokens(x))
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


def checkpoint_filter_fn(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A state dict of another image size, its position map resized to the module's."""
    assert isinstance(module, SReT)
    size = module.pos_embed.shape[-2:]
    table = F.interpolate(state["pos_embed"], size, mode="bicubic", align_corners=False)
    return {**state, "pos_embed": table}


@register_backbone(
    "SReT",
    {
        "sret_t": Variant(paper_name="SReT-T", params_m=4.76, headline=True),
        "sret_lt": Variant(paper_name="SReT-LT", params_m=4.99),
        "sret_s": Variant(paper_name="SReT-S", params_m=20.90),
    },
    licence="mit",
    doc=226,
)
def sret(variant: str, *, num_classes: int, img_size: int) -> SReT:
    """SReT of one size; ``img_size`` is a multiple of 32, so that groups of tokens are equal."""
    check_side("SReT", img_size)
    return SReT(_SIZES[variant], num_classes, img_size)
