"""UniRepLKNet: Ding et al., *UniRepLKNet: A Universal Perception Large-Kernel ConvNet* (CVPR
2024), and *Scaling Up Your Kernels* (2024), its journal version.

Built in the training form, whose names are those of the official checkpoints. ``reparameterize``
gives the deployed form: one convolution instead of up to six branches. The papers' parameter
counts (4.4, 6.2, 10.7 … million) are those of the deployed form.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.reparam import fold_batchnorm, spread_kernel
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["UniRepLKNet", "unireplknet"]

# kernel size of a block: (kernel size, dilation) of its further branches (paper, table 3)
_BRANCHES = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}

# width, depths, kernel sizes that alternate in the third stage
_SIZES = {
    "a": (40, (2, 2, 6, 2), (13,)),
    "f": (48, (2, 2, 6, 2), (13,)),
    "p": (64, (2, 2, 6, 2), (13,)),
    "n": (80, (2, 2, 8, 2), (13,)),
    "t": (80, (3, 3, 18, 3), (13, 3)),
    "s": (96, (3, 3, 27, 3), (13, 3, 3)),
    "b": (128, (3, 3, 27, 3), (13, 3, 3)),
    "l": (192, (3, 3, 27, 3), (13, 3, 3)),
    "xl": (256, (3, 3, 27, 3), (13, 3, 3)),
}


def _depthwise(dim: int, kernel: int, dilation: int = 1, *, bias: bool = False) -> nn.Conv2d:
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(dim, dim, kernel, padding=padding, dilation=dilation, groups=dim, bias=bias)


class DilatedReparamBlock(nn.Module):
    """Sum of a large depthwise convolution and dilated small ones, each with its BatchNorm."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.lk_origin = _depthwise(dim, kernel)
        self.origin_bn = nn.BatchNorm2d(dim)
        self.branches = _BRANCHES[kernel]
        for k, dilation in self.branches:
            self.add_module(f"dil_conv_k{k}_{dilation}", _depthwise(dim, k, dilation))
            self.add_module(f"dil_bn_k{k}_{dilation}", nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.origin_bn(self.lk_origin(x))
        for conv, norm, _ in self._dilated():
            out = out + norm(conv(x))
        return out

    def folded(self) -> tuple[Tensor, Tensor]:
        """Kernel (C, 1, K, K) and bias (C) of the one convolution that gives the same."""
        assert isinstance(self.origin_bn, nn.BatchNorm2d)
        weight, bias = fold_batchnorm(self.lk_origin.weight, None, self.origin_bn)
        for conv, norm, dilation in self._dilated():
            dense = spread_kernel(conv.weight, dilation, self.kernel)
            part, shift = fold_batchnorm(dense, None, norm)
            weight, bias = weight + part, bias + shift
        return weight, bias

    def _dilated(self) -> list[tuple[nn.Conv2d, nn.BatchNorm2d, int]]:
        found = []
        for k, dilation in self.branches:
            conv = self.get_submodule(f"dil_conv_k{k}_{dilation}")
            norm = self.get_submodule(f"dil_bn_k{k}_{dilation}")
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            found.append((conv, norm, dilation))
        return found


class SEBlock(nn.Module):
    """Squeeze and excitation on (N, C, H, W)."""

    def __init__(self, dim: int, squeezed: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(dim, squeezed, 1)
        self.up = nn.Conv2d(squeezed, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))
        out: Tensor = x * gate.sigmoid()
        return out


class GRN(nn.Module):
    """Global response normalisation on (N, H, W, C) (ConvNeXt V2, eq. 1 to 3).

    ``gamma * x * n + beta + x`` with n the channel's L2 norm over the map, divided by the mean of
    the norms. Without ``beta`` in the deployed form.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.sqrt((x * x).sum((1, 2), keepdim=True))
        x = (self.gamma * (norm / (norm.mean(-1, keepdim=True) + 1e-6)) + 1) * x
        return x if self.beta is None else x + self.beta


class _ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class _ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """``x += gamma FFN(SE(BN(DW x)))`` on (N, C, H, W) (paper, figure 2)."""

    gamma: Tensor | None

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        large = kernel >= 7
        self.dwconv = DilatedReparamBlock(dim, kernel) if large else _depthwise(dim, kernel)
        self.norm: nn.Module = nn.BatchNorm2d(dim)
        self.se = SEBlock(dim, dim // 4)
        self.pwconv1 = nn.Sequential(_ChannelsLast(), nn.Linear(dim, 4 * dim))
        self.act = nn.Sequential(nn.GELU(), GRN(4 * dim))
        self.pwconv2 = nn.Sequential(
            nn.Linear(4 * dim, dim, bias=False), _ChannelsFirst(), nn.BatchNorm2d(dim)
        )
        self.gamma = nn.Parameter(1e-6 * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pwconv2(self.act(self.pwconv1(self.se(self.norm(self.dwconv(x))))))
        out: Tensor = x + (y if self.gamma is None else y * self.gamma.view(-1, 1, 1))
        return out

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold branches, BatchNorms, GRN's beta and gamma into the layers they meet, once."""
        if self.gamma is None:
            return
        linear, grn, last = self.pwconv2[0], self.act[1], self.pwconv2[2]
        assert isinstance(linear, nn.Linear) and isinstance(grn, GRN)
        assert isinstance(self.norm, nn.BatchNorm2d) and isinstance(last, nn.BatchNorm2d)
        assert grn.beta is not None
        if isinstance(self.dwconv, DilatedReparamBlock):
            kernel, bias = self.dwconv.folded()
        else:
            kernel, bias = self.dwconv.weight, torch.zeros_like(self.norm.bias)
        kernel, bias = fold_batchnorm(kernel, bias, self.norm)
        self.dwconv = _depthwise(len(bias), kernel.shape[-1], bias=True)
        _fill(self.dwconv, kernel, bias)
        self.norm = nn.Identity()
        weight, bias = fold_batchnorm(linear.weight, linear.weight @ grn.beta.flatten(), last)
        weight, bias = weight * self.gamma.unsqueeze(1), bias * self.gamma
        merged = nn.Linear(linear.in_features, len(bias))
        _fill(merged, weight, bias)
        self.pwconv2 = nn.Sequential(merged, _ChannelsFirst())
        grn.beta = None
        self.gamma = None


def _fill(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())


class UniRepLKNet(nn.Module):
    """float32 (N, 3, S, S) to (N, classes); strides 4, 8, 16, 32."""

    def __init__(
        self, width: int, depths: tuple[int, ...], pattern: tuple[int, ...], num_classes: int
    ) -> None:
        super().__init__()
        norm = timm.layers.LayerNorm2d
        dims = [width * 2**i for i in range(4)]
        stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, stride=2, padding=1),
            norm(width // 2),
            nn.GELU(),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1),
            norm(width),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in itertools.pairwise(dims):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1)
            self.downsample_layers.append(nn.Sequential(conv, norm(after)))
        kernels = ((3,), (13,), pattern, (13,))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, ks[i % len(ks)]) for i in range(depth)))
            for dim, depth, ks in zip(dims, depths, kernels, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        scores: Tensor = self.head(self.norm(x.mean((2, 3))))
        return scores


def _variant(letter: str, params_m: float, *, headline: bool = False) -> Variant:
    return Variant(paper_name=f"UniRepLKNet-{letter}", params_m=params_m, headline=headline)


@register_backbone(
    "UniRepLKNet",
    {
        "unireplknet_a": _variant("A", 4.65),
        "unireplknet_f": _variant("F", 6.49),
        "unireplknet_p": _variant("P", 11.08),
        "unireplknet_n": _variant("N", 18.82),
        "unireplknet_t": _variant("T", 31.69, headline=True),
        "unireplknet_s": _variant("S", 56.46),
        "unireplknet_b": _variant("B", 99.09),
        "unireplknet_l": _variant("L", 220.08),
        "unireplknet_xl": _variant("XL", 388.69),
    },
    licence="apache-2.0",
    doc=92,
)
def unireplknet(variant: str, *, num_classes: int, img_size: int) -> UniRepLKNet:
    """UniRepLKNet of one size, in the training form; ``img_size`` is a multiple of 32.

    B, L and XL were published with weights of ImageNet-22K, tuned at 384 pixels.
    """
    check_side("UniRepLKNet", img_size)
    width, depths, pattern = _SIZES[variant.rsplit("_", 1)[1]]
    return UniRepLKNet(width, depths, pattern, num_classes)
