"""Tiny networks and their captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx, nn

from deploykit._compat import timm
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.edit import is_op
from deploykit.types import Backbone, Preprocessing, WeightsOrigin

aten = torch.ops.aten
SIZE = 32


def make_backbone(module: nn.Module, size: int = SIZE, classes: int = 10) -> Backbone:
    """A module in eval mode, dressed as a backbone."""
    return Backbone(
        name="tiny",
        module=module.eval().requires_grad_(False),
        preprocessing=Preprocessing(size=size, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        weights=WeightsOrigin(kind="random", source="tests"),
        num_classes=classes,
    )


def captured(module: nn.Module, size: int = SIZE) -> CapturedModel:
    return capture(make_backbone(module, size))


def images(count: int = 3, size: int = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batches(size: int = SIZE, count: int = 4) -> Callable[[], Iterable[Tensor]]:
    """Two calibration batches, the same each time they are asked for."""
    return lambda: [images(count, size, seed=1), images(count, size, seed=2)]


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, norms' affine parts and BatchNorm statistics, none of them trivial."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator).to(tensor) * (high - low) + low)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                bound = (6 / parameter[0].numel()) ** 0.5
                uniform(parameter, -bound, bound)
            elif name.endswith("bias"):
                uniform(parameter, -0.3, 0.3)
            else:
                uniform(parameter, 0.5, 1.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                uniform(buffer, 0.5, 2.0)
            elif name.endswith("running_mean"):
                uniform(buffer, -0.5, 0.5)
    return module


def nodes_of(graph_module: fx.GraphModule, *targets: Callable[..., object]) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if is_op(node, *targets)]


class TinyCnn(nn.Module):
    """Stem, depthwise convolution with a residual, 1x1 convolution and a BN-linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU(inplace=True)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.depthwise_norm = nn.BatchNorm2d(16)
        self.narrow = nn.Conv2d(16, 24, 1)
        self.wide = nn.Conv2d(24, 24, 3, 2, 1)
        self.head_norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_norm(self.stem(x)))
        x = x + self.depthwise_norm(self.depthwise(x))
        x = self.act(self.wide(self.act(self.narrow(x))))
        return self.head(self.head_norm(x.mean((2, 3))))


def tiny_cnn(seed: int = 0) -> nn.Module:
    return shake(TinyCnn(), seed).eval()


def tiny_vit(seed: int = 0) -> nn.Module:
    vit = timm.models.VisionTransformer(
        img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10
    )
    return shake(vit, seed).eval()


def tiny_shvit(seed: int = 0) -> nn.Module:
    """SHViT-S1, every norm of it doing something (timm starts some BatchNorms at zero)."""
    return shake(timm.create_model("shvit_s1", num_classes=10), seed).eval()
