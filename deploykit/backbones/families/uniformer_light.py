"""UniFormer-XXS and XS, the light versions: Li et al., *UniFormer* (TPAMI 2023), section 3.5.

After the first block of attention, a class token's attention ranks the tokens. Half of them are
updated by attention and MLP; the others are summed into one token that goes along and then hands
its change to all of them: slow and fast updates, as in Xu et al., *Evo-ViT* (AAAI 2022), section 4.

After the papers: at which point the official code takes and mixes ranks, and how it joins its
two heads (of the map and of the class token; here their mean) isn't established, so official
checkpoints are not converted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.families.uniformer import ConvEmbed, LocalBlock, PatchEmbed
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["EvolvingBlock", "UniFormerLight", "uniformer_light"]

_RATIO = 3
_KEPT = 0.5  # share of the tokens that are updated slowly
_MIX = 0.5  # weight of the ranks so far, against those of this block


@dataclass(frozen=True)
class _Size:
    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    head: int


_SIZES = {
    "uniformer_xxs": _Size((56, 112, 224, 448), (2, 5, 8, 2), 28),
    "uniformer_xs": _Size((64, 128, 256, 512), (3, 5, 9, 3), 32),
}


class RankingAttention(nn.Module):
    """Attention that also tells how much the first token looks at the others.

    (N, 1 + L, C) to the same shape, and (N, L): the class token's attention, mean over the heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((attention @ v).transpose(1, 2).flatten(2))
        return out, attention[:, :, 0, 1:].mean(1)


class EvolvingBlock(nn.Module):
    """``x += DW3(x); x += MHA(LN x); x += MLP(LN x)``, on all tokens or on the leading half.

    Class token (N, 1, C), map (N, C, S, S) and ranks (N, S²) to the same; where ``kept`` is S²,
    ranks aren't read.
    """

    def __init__(self, dim: int, heads: int, side: int, kept: int) -> None:
        super().__init__()
        self.side, self.kept = side, kept
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RankingAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = timm.layers.Mlp(dim, _RATIO * dim)

    def forward(self, first: Tensor, x: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = to_tokens(x + self.pos_embed(x))
        if self.kept == self.side**2:
            y, ranks = self._update(torch.cat((first, tokens), dim=1))
            return y[:, :1], to_map(y[:, 1:], self.side, self.side), ranks
        order = ranks.argsort(dim=1, descending=True, stable=True)
        ranks, tokens = ranks.gather(1, order), _take(tokens, order)
        leading, rest = tokens[:, : self.kept], tokens[:, self.kept :]
        share = ranks[:, self.kept :]
        share = (share / share.sum(1, keepdim=True)).unsqueeze(1)
        summary = share @ rest  # (N, 1, C)
        y, seen = self._update(torch.cat((first, leading, summary), dim=1))
        rest = rest + (y[:, -1:] - summary)
        tokens = torch.cat((y[:, 1:-1], rest), dim=1)
        leaders = _MIX * ranks[:, : self.kept] + (1 - _MIX) * seen[:, : self.kept]
        ranks = torch.cat((leaders, ranks[:, self.kept :]), dim=1)
        back = order.argsort(dim=1)
        tokens, ranks = _take(tokens, back), ranks.gather(1, back)
        return y[:, :1], to_map(tokens, self.side, self.side), ranks

    def _update(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, seen = self.attn(self.norm1(x))
        x = x + y
        return x + self.mlp(self.norm2(x)), seen


def _take(tokens: Tensor, order: Tensor) -> Tensor:
    """(N, L, C) in another order, (N, L), of each image's own."""
    return tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class UniFormerLight(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes): the mean of the map's and the class token's head."""

    def __init__(self, size: _Size, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        befores = (3, *size.dims)
        for i, (before, dim, depth) in enumerate(
            zip(befores, size.dims, size.depths, strict=False), start=1
        ):
            embed = ConvEmbed(before, dim, first=True) if i == 1 else PatchEmbed(before, dim, 2)
            self.add_module(f"patch_embed{i}", embed)
            blocks: list[nn.Module] = []
            for block in range(depth):
                if i <= 2:
                    blocks.append(LocalBlock(dim, _RATIO))
                    continue
                side = img_size // 2 ** (i + 1)
                all_kept = i == 3 and block == 0
                kept = side**2 if all_kept else int(side**2 * _KEPT)
                blocks.append(EvolvingBlock(dim, dim // size.head, side, kept))
            self.add_module(f"blocks{i}", nn.ModuleList(blocks))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dims[2]))
        timm.layers.trunc_normal_(self.cls_token, std=0.02)
        self.cls_upsample = nn.Linear(size.dims[2], size.dims[3])
        self.norm = nn.BatchNorm2d(size.dims[-1])
        self.norm_cls = nn.LayerNorm(size.dims[-1])
        self.head = nn.Linear(size.dims[-1], num_classes)
        self.head_cls = nn.Linear(size.dims[-1], num_classes)
        self.sides = (img_size // 16, img_size // 32)
        self.pool = nn.AvgPool2d(2)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for i in (1, 2):
            x = self.get_submodule(f"patch_embed{i}")(x)
            for block in self.get_submodule(f"blocks{i}").children():
                x = block(x)
        x = self.get_submodule("patch_embed3")(x)
        first = self.cls_token.expand(x.shape[0], -1, -1)
        ranks = x.new_zeros(x.shape[0], self.sides[0] ** 2)
        for block in self.get_submodule("blocks3").children():
            first, x, ranks = block(first, x, ranks)
        ranks = self.pool(ranks.unflatten(1, (1, self.sides[0], self.sides[0]))).flatten(1)
        first, x = self.cls_upsample(first), self.get_submodule("patch_embed4")(x)
        for block in self.get_submodule("blocks4").children():
            first, x, ranks = block(first, x, ranks)
        logits: Tensor = self.head(self.norm(x).mean((2, 3)))
        other: Tensor = self.head_cls(self.norm_cls(first)[:, 0])
        return (logits + other) / 2


@register_backbone(
    "UniFormer light",
    {
        "uniformer_xxs": Variant(paper_name="UniFormer-XXS (after the paper)", params_m=10.22),
        "uniformer_xs": Variant(
            paper_name="UniFormer-XS (after the paper)", params_m=16.51, headline=True
        ),
    },
    licence="apache-2.0",
    doc=1,
)
def uniformer_light(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a light UniFormer; sizes are multiples of 32 pixels."""
    check_side("UniFormer", img_size)
    return UniFormerLight(_SIZES[variant], num_classes, img_size)
