"""Networks small enough to take through the whole pipeline in a test."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit._compat import timm

SIZE = 32
PREPROCESSING = {"size": SIZE, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
CLASSES = 4


class Attention(nn.Module):
    """A GroupNorm before a 1x1 convolution and single-head attention, as in SHViT."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k * k.shape[1] ** -0.5).softmax(-1)
        return x + (v @ weights.transpose(1, 2)).reshape(x.shape)


def tiny_hybrid(num_classes: int = CLASSES) -> nn.Module:
    """Convolutions with BatchNorm, a depthwise one, attention, and a linear head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False),
            nn.BatchNorm2d(16),
            Attention(16),
            nn.Conv2d(16, 512, 1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, num_classes),
        )
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    net.deploykit_preprocessing = dict(PREPROCESSING)
    return net.eval()


def tiny_tokens(num_classes: int = CLASSES) -> nn.Module:
    """A plain ViT of 65 tokens: enough to merge some."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net: nn.Module = timm.models.VisionTransformer(
            img_size=SIZE, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=num_classes
        )
        for parameter in net.parameters():
            if parameter.ndim == 2:  # timm's own start is too quiet to tell tokens apart
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    net.deploykit_preprocessing = dict(PREPROCESSING)
    return net.eval()


class Branching(nn.Module):
    """What it computes hangs on the numbers it gets, which no captured graph can say."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3))
        result: Tensor = self.head(-pooled if pooled.sum() > 0 else pooled)
        return result


def tiny_branching() -> nn.Module:
    """A network that torch.export refuses."""
    net: nn.Module = Branching()
    net.deploykit_preprocessing = dict(PREPROCESSING)
    return net.eval()


def tiny_windows(num_classes: int = CLASSES) -> nn.Module:
    """A Swin of two stages: feature maps of 8 and of 4 places a side."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net: nn.Module = timm.models.SwinTransformer(
            img_size=SIZE, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1),
            num_heads=(2, 4), num_classes=num_classes,
        )  # fmt: skip
        for parameter in net.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    net.deploykit_preprocessing = dict(PREPROCESSING)
    return net.eval()


class Staged(nn.Module):
    """Stages in a list and scores at the end, but no way of timm's to its maps."""

    def __init__(self, channels: tuple[int, ...] = (8, 12)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        widths = zip((8, *channels), channels, strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU()) for i, o in widths
        )
        self.head = nn.Linear(channels[-1], CLASSES)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The maps of the stages."""
        x, found = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.maps(x)[-1].mean((2, 3)))
        return scores


class Encoder(Staged):
    """The same, giving its maps."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.maps(x)


def _seeded(make: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        net = make()
    net.deploykit_preprocessing = dict(PREPROCESSING)
    return net.eval()


def tiny_stages() -> nn.Module:
    """Scores by two stages."""
    return _seeded(Staged)


def tiny_encoder() -> nn.Module:
    """The maps of two stages, as a detector's backbone gives them."""
    return _seeded(Encoder)
