"""RaftMLP: Tatsunami and Taki, *RaftMLP: How Much Can Be Done Without Attention and with Less
Spatial Locality?* (ACCV 2022).

The widths of the mixing layers are the map's sides: a network is built for one image size, and
weights of another size don't fit. A linear layer over concatenated patches of several scales
(multi-scale embedding) is written as the sum of one convolution a scale, which is the same and
needs no gathering. How the authors' checkpoints name their tensors is not known here.
"""

from __future__ import annotations

from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["RaftMLP", "raftmlp"]

_RAFT = 2  # channels are cut into so many groups that are mixed together
_DEPTHS = (2, 2, 6, 2)
_STRIDES = (4, 2, 2, 2)
_KERNELS = ((4, 8), (2, 4), (2, 4), (2,))

_WIDTHS = {
    "raftmlp_s": (64, 128, 256, 512),
    "raftmlp_m": (96, 192, 384, 768),
    "raftmlp_l": (128, 192, 512, 1024),
}


class MultiScaleEmbed(nn.Module):
    """Patches of several sizes around the same centres, embedded together.

    (N, C, H, W) to (N, H / s, W / s, C').
    """

    def __init__(self, dim: int, out: int, stride: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.scales = nn.ModuleList(
            nn.Conv2d(dim, out, k, stride, (k - stride) // 2, bias=not index)
            for index, k in enumerate(kernels)
        )

    def forward(self, x: Tensor) -> Tensor:
        total = self.scales[0](x)
        for scale in list(self.scales)[1:]:
            total = total + scale(x)
        embedded: Tensor = total.permute(0, 2, 3, 1)
        return embedded


class RaftMixing(nn.Module):
    """``x += MLP(LN x)`` over an axis and the groups of channels together.

    On (N, H, W, C): along H if ``vertical``, else along W. Channels are (raft, C / raft).
    """

    def __init__(self, dim: int, side: int, vertical: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(_RAFT * side, 2 * _RAFT * side)
        self.vertical = vertical

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.vertical:
            y = y.transpose(1, 2)
        _, _, side, channels = y.shape
        # (N, other, side, raft, C / raft) to (N, other, C / raft, raft · side) and back
        y = y.unflatten(3, (_RAFT, channels // _RAFT)).permute(0, 1, 4, 3, 2).flatten(3)
        y = self.mlp(y).unflatten(3, (_RAFT, side)).permute(0, 1, 4, 3, 2).flatten(3)
        if self.vertical:
            y = y.transpose(1, 2)
        x = x + y
        return x


class ChannelMLP(nn.Module):
    """``x += MLP(LN x)`` over the channels of (N, H, W, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = timm.layers.Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mlp(self.norm(x))
        return y


class RaftMLP(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(self, widths: tuple[int, ...], num_classes: int, img_size: int) -> None:
        super().__init__()
        levels = []
        dim, side = 3, img_size
        for out, depth, stride, kernels in zip(widths, _DEPTHS, _STRIDES, _KERNELS, strict=True):
            side //= stride
            layers: list[nn.Module] = [MultiScaleEmbed(dim, out, stride, kernels)]
            for _ in range(depth):
                layers += [RaftMixing(out, side, vertical=vertical) for vertical in (True, False)]
                layers += [ChannelMLP(out)]
            levels.append(nn.Sequential(*layers))
            dim = out
        self.levels = nn.ModuleList(levels)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for index, level in enumerate(self.levels):
            x = level(x.permute(0, 3, 1, 2) if index else x)
        scores: Tensor = self.head(self.norm(x).mean((1, 2)))
        return scores


@register_backbone(
    "RaftMLP",
    {
        "raftmlp_s": Variant(paper_name="RaftMLP-S", params_m=9.87, headline=True),
        "raftmlp_m": Variant(paper_name="RaftMLP-M", params_m=21.41),
        "raftmlp_l": Variant(paper_name="RaftMLP-L", params_m=36.18),
    },
    licence="apache-2.0",
    doc=94,
)
def raftmlp(variant: str, *, num_classes: int, img_size: int) -> RaftMLP:
    """RaftMLP of one size; ``img_size`` is a multiple of 32."""
    check_side("RaftMLP", img_size)
    return RaftMLP(_WIDTHS[variant], num_classes, img_size)
