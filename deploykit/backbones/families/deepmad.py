"""DeepMAD: Shen et al., *DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural
Network* (CVPR 2023).

Plain bottlenecks whose widths and depths an optimiser chose. The paper's 11.69 M (R18), 21.80 M
(R34) and 25.55 M (R50) come out as 11.68, 21.69 and 25.44 M from the published structures. Not
settled by them, and therefore chosen here: SiLU in the networks with squeeze-and-excitation, and
a squeeze to a quarter of the bottleneck (which gives the 29 M, 50 M and 89 M). How the authors'
checkpoints name their tensors is not known here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["DeepMAD", "deepmad"]


class Stage(NamedTuple):
    """``depth`` bottlenecks ``inner`` wide with kernels of ``kernel``, ``out`` channels after."""

    depth: int
    inner: int
    kernel: int
    out: int
    stride: int


class Structure(NamedTuple):
    """Channels of the stem, the stages, and of the last convolution (0: there is none)."""

    stem: int
    stages: tuple[Stage, ...]
    last: int = 0

    @property
    def depthwise(self) -> bool:
        """Inverted bottlenecks with squeeze-and-excitation; the R networks have full ones."""
        return self.last > 0


def _structure(stem: int, *stages: tuple[int, int, int, int, int], last: int = 0) -> Structure:
    return Structure(stem, tuple(Stage(*stage) for stage in stages), last)


_STRUCTURES = {
    "deepmad_r18": _structure(
        32, (1, 40, 5, 96, 2), (6, 40, 5, 384, 2), (9, 64, 5, 384, 2), (10, 104, 3, 1024, 1),
        (12, 104, 5, 672, 2),
    ),
    "deepmad_r34": _structure(
        24, (1, 24, 5, 128, 2), (10, 48, 5, 512, 2), (13, 88, 5, 896, 2), (11, 104, 5, 1024, 1),
        (14, 128, 5, 616, 2),
    ),
    "deepmad_r50": _structure(
        32, (1, 40, 5, 128, 2), (11, 48, 5, 512, 2), (12, 88, 5, 872, 2), (13, 104, 5, 1024, 1),
        (15, 120, 5, 1232, 2),
    ),
    "deepmad_29m": _structure(
        40, (2, 240, 5, 40, 1), (4, 512, 5, 85, 2), (6, 800, 5, 134, 2), (6, 1208, 5, 201, 2),
        (5, 1872, 5, 312, 2), last=1792,
    ),
    "deepmad_29m_288": _structure(
        40, (4, 368, 5, 61, 2), (4, 576, 5, 96, 2), (5, 872, 5, 145, 2), (6, 1304, 5, 217, 1),
        (4, 1968, 5, 328, 2), last=1792,
    ),
    "deepmad_50m": _structure(
        48, (7, 672, 5, 112, 2), (9, 1008, 5, 168, 2), (7, 1512, 5, 252, 2), (3, 2272, 5, 378, 2),
        (1, 3456, 3, 576, 1), last=2048,
    ),
    "deepmad_89m": _structure(
        56, (10, 816, 5, 136, 2), (9, 1224, 5, 204, 2), (7, 1952, 5, 326, 2), (4, 2944, 5, 490, 2),
        (1, 4464, 3, 744, 1), last=2560,
    ),
}  # fmt: skip


def _conv(dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2
    return nn.Conv2d(dim, out, kernel, stride, padding, groups=groups, bias=False)


class Bottleneck(nn.Module):
    """1×1 to ``inner``, k×k (depthwise, then squeezed and excited, where so asked), 1×1 to ``out``.

    (N, C, H, W) to (N, out, H / s, W / s), plus the input: averaged where strided, projected where
    the width changes.
    """

    def __init__(self, dim: int, stage: Stage, stride: int, depthwise: bool) -> None:
        super().__init__()
        inner, out = stage.inner, stage.out
        self.conv1 = _conv(dim, inner, 1)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = _conv(inner, inner, stage.kernel, stride, inner if depthwise else 1)
        self.bn2 = nn.BatchNorm2d(inner)
        squeeze = timm.layers.SqueezeExcite(inner, rd_channels=inner // 4)
        self.se = squeeze if depthwise else nn.Identity()
        self.conv3 = _conv(inner, out, 1)
        self.bn3 = nn.BatchNorm2d(out)
        self.act = nn.SiLU() if depthwise else nn.ReLU()
        self.last_act = nn.Identity() if depthwise else nn.ReLU()
        shortcut: list[nn.Module] = [nn.AvgPool2d(2)] if stride == 2 else []
        if dim != out:
            shortcut += [_conv(dim, out, 1), nn.BatchNorm2d(out)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.se(self.act(self.bn2(self.conv2(y))))
        out: Tensor = self.last_act(self.bn3(self.conv3(y)) + self.shortcut(x))
        return out


class DeepMAD(nn.Module):
    """float32 (N, 3, S, S) to (N, classes)."""

    def __init__(self, structure: Structure, num_classes: int) -> None:
        super().__init__()
        depthwise = structure.depthwise
        self.stem = self._step(3, structure.stem, 3, 2, depthwise)
        blocks: list[nn.Module] = []
        dim = structure.stem
        for stage in structure.stages:
            for index in range(stage.depth):
                blocks.append(Bottleneck(dim, stage, 1 if index else stage.stride, depthwise))
                dim = stage.out
        self.blocks = nn.Sequential(*blocks)
        last = structure.last
        self.last = self._step(dim, last, 1, 1, depthwise) if last else nn.Identity()
        self.head = nn.Linear(last or dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _step(dim: int, out: int, kernel: int, stride: int, silu: bool) -> nn.Sequential:
        act = nn.SiLU() if silu else nn.ReLU()
        return nn.Sequential(_conv(dim, out, kernel, stride), nn.BatchNorm2d(out), act)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@register_backbone(
    "DeepMAD",
    {
        "deepmad_r18": Variant(paper_name="DeepMAD-R18", params_m=11.68, headline=True),
        "deepmad_r34": Variant(paper_name="DeepMAD-R34", params_m=21.69),
        "deepmad_r50": Variant(paper_name="DeepMAD-R50", params_m=25.44),
        "deepmad_29m": Variant(paper_name="DeepMAD-29M", params_m=28.91),
        "deepmad_29m_288": Variant(paper_name="DeepMAD-29M 288", params_m=29, input=288),
        "deepmad_50m": Variant(paper_name="DeepMAD-50M", params_m=50),
        "deepmad_89m": Variant(paper_name="DeepMAD-89M", params_m=89),
    },
    licence="apache-2.0",
    doc=171,
)
def deepmad(variant: str, *, num_classes: int, img_size: int) -> DeepMAD:
    """DeepMAD of one structure; ``img_size`` is a multiple of 32."""
    check_side("DeepMAD", img_size)
    return DeepMAD(_STRUCTURES[variant], num_classes)
