"""CSWin: Dong et al., *CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped
Windows* (CVPR 2022).

Modules are named as in the official checkpoints, which load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.windows import cut_windows, join_windows
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["CSWin", "cswin"]

# width, depths, heads
_SIZES = {
    "cswin_t": (64, (1, 2, 21, 1), (2, 4, 8, 16)),
    "cswin_s": (64, (2, 4, 32, 2), (2, 4, 8, 16)),
    "cswin_b": (96, (2, 4, 32, 2), (4, 8, 16, 32)),
    "cswin_l": (144, (2, 4, 32, 2), (6, 12, 24, 24)),
}


class LePEAttention(nn.Module):
    """Attention within stripes, plus a depthwise 3x3 of the values within each (eq. 6 and 7).

    q, k, v: (N, HW, C) each; gives (N, HW, C). ``stripe`` is (height, width).
    """

    def __init__(self, dim: int, heads: int, side: int, stripe: tuple[int, int]) -> None:
        super().__init__()
        self.side, self.stripe, self.heads = side, stripe, heads
        self.scale = (dim // heads) ** -0.5
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = self._cut(v)  # (N · stripes, h, w, C)
        local = self.get_v(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k = self._heads(self._cut(q)) * self.scale, self._heads(self._cut(k))
        attention = (q @ k.transpose(-2, -1)).softmax(-1)
        out = (attention @ self._heads(v)).transpose(1, 2).reshape(local.shape)
        return join_windows(out + local, (self.side, self.side)).flatten(1, 2)

    def _cut(self, x: Tensor) -> Tensor:
        return cut_windows(x.unflatten(1, (self.side, self.side)), self.stripe)

    def _heads(self, x: Tensor) -> Tensor:
        """(N, h, w, C) to (N, heads, hw, C / heads)."""
        out: Tensor = x.flatten(1, 2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return out


class CSWinBlock(nn.Module):
    """``x += proj(attention(LN x)); x += MLP(LN x)`` on (N, HW, C) (eq. 8).

    Half of the heads look along columns, half along rows, in stripes ``width`` wide. A stripe as
    wide as the map is the whole map: one attention over all of it then.
    """

    def __init__(self, dim: int, heads: int, side: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        stripes = [(side, side)] if side == width else [(side, width), (width, side)]
        branches = len(stripes)
        self.attns = nn.ModuleList(
            LePEAttention(dim // branches, heads // branches, side, stripe) for stripe in stripes
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        branches = len(self.attns)
        parts = zip(*(t.chunk(branches, dim=-1) for t in (q, k, v)), strict=True)
        outs = [attend(*part) for attend, part in zip(self.attns, parts, strict=True)]
        x = x + self.proj(torch.cat(outs, dim=-1))
        x = x + self.mlp(self.norm2(x))
        return x


class MergeBlock(nn.Module):
    """Halves the map: (N, HW, C) to (N, HW / 4, C')."""

    def __init__(self, dim: int, out: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(to_tokens(self.conv(to_map(x, self.side, self.side))))
        return x


class _Tokens(nn.Module):
    """(N, C, H, W) to (N, HW, C), as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(x)


class CSWin(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(
        self,
        width: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        num_classes: int,
        img_size: int,
    ) -> None:
        super().__init__()
        stem = nn.Conv2d(3, width, 7, stride=4, padding=2)
        self.stage1_conv_embed = nn.Sequential(stem, _Tokens(), nn.LayerNorm(width))
        last = img_size // 32
        stripes = (1, 2, last, last)  # the paper's 7 at 224 pixels and 12 at 384
        for stage in range(4):
            dim, side = width * 2**stage, img_size // 2 ** (stage + 2)
            if stage:
                self.add_module(f"merge{stage}", MergeBlock(dim // 2, dim, 2 * side))
            blocks = [
                CSWinBlock(dim, heads[stage], side, stripes[stage]) for _ in range(depths[stage])
            ]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(8 * width)
        self.head = nn.Linear(8 * width, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.get_submodule("stage1")(self.stage1_conv_embed(x))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"merge{stage}")(x)
            x = self.get_submodule(f"stage{stage + 1}")(x)
        scores: Tensor = self.head(self.norm(x).mean(1))
        return scores


@register_backbone(
    "CSWin",
    {
        "cswin_t": Variant(paper_name="CSWin-T", params_m=22.32, crop_pct=0.9, headline=True),
        "cswin_s": Variant(paper_name="CSWin-S", params_m=34.64, crop_pct=0.9),
        "cswin_b": Variant(paper_name="CSWin-B", params_m=77.38, crop_pct=0.9),
        "cswin_l": Variant(paper_name="CSWin-L", params_m=173.26, crop_pct=0.9),
    },
    licence="mit",
    doc=57,
)
def cswin(variant: str, *, num_classes: int, img_size: int) -> CSWin:
    """CSWin of one size; ``img_size`` is a multiple of 32.

    Stripes of the third and fourth stage are as wide as the last map, so that they divide it at
    any size. That is the paper's 7 at 224 pixels and 12 at 384; no weight depends on it.
    """
    check_side("CSWin", img_size)
    width, depths, heads = _SIZES[variant]
    return CSWin(width, depths, heads, num_classes, img_size)
