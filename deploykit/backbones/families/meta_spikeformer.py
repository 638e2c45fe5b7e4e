"""Meta-SpikeFormer: Yao et al., *Spike-driven Transformer V2: Meta Spiking Neural Network
Architecture Inspiring the Design of Next-generation Neuromorphic Chips* (ICLR 2024).

Every layer's input is spikes, 0 or 1, of neurons that are simulated for four steps; the steps are
unrolled. It is here to be measured and quantised: on ordinary processors a spike is a number like
any other, and four steps cost four times one. A spike's step has no gradient, so recovery can't
train it (the paper trains with a stand-in's gradient).

Layers follow the paper's table 5 and figure 2. How the official checkpoints name them isn't
established, so they are not converted.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit.backbones.layers.init import draw_weights
from deploykit.backbones.layers.sizes import check_side
from deploykit.backbones.registry import Variant, register_backbone

__all__ = ["MetaSpikeFormer", "SpikeAttention", "meta_spikeformer", "spikes"]

_STEPS = 4
_DECAY = 2.0  # the membrane's time constant, in steps
_HEADS, _RATIO = 8, 4
_ATTENTION_SCALE, _ATTENTION_THRESHOLD = 0.125, 0.5
_DEPTHS = (6, 2)
_DIMS = {
    "meta_spikeformer_15m": (64, 128, 256, 360),
    "meta_spikeformer_31m": (96, 192, 384, 480),
    "meta_spikeformer_55m": (128, 256, 512, 640),
}


def spikes(current: Tensor, threshold: float = 1.0) -> Tensor:
    """Leaky integrate-and-fire neurons: currents (T, …) to spikes, 0 or 1.

    ``v += (current - v) / 2``; at ``v >= threshold`` a neuron fires and starts again from 0.
    """
    potential = current[0] / _DECAY
    fired = []
    for step in range(current.shape[0]):
        if step:
            potential = potential + (current[step] - potential) / _DECAY
        spike = (potential >= threshold).to(current.dtype)
        fired.append(spike)
        potential = potential * (1 - spike)
    return torch.stack(fired)


class Timed(nn.Module):
    """Layers without memory, applied to each step: (T, N, C, H, W) to the same kind."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[0]
        out: Tensor = self.layers(x.flatten(0, 1)).unflatten(0, (steps, -1))
        return out


def _normed(
    dim: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return conv, nn.BatchNorm2d(out)


def _spread(dim: int) -> Timed:
    """RepConv, a 3x3 convolution in three factors, and its BatchNorm.

    Padding comes before the first factor, so that the border passes its BatchNorm too.
    """
    return Timed(
        nn.Conv2d(dim, dim, 1, padding=1, bias=False),
        nn.BatchNorm2d(dim),
        nn.Conv2d(dim, dim, 3, groups=dim, bias=False),
        nn.Conv2d(dim, dim, 1, bias=False),
        nn.BatchNorm2d(dim),
        nn.BatchNorm2d(dim),
    )


class ConvBlock(nn.Module):
    """``x += SepConv(x); x += conv(conv(x))``, spikes before each; (T, N, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = 2 * dim
        self.expand = Timed(*_normed(dim, wide, 1))
        self.separate = Timed(
            nn.Conv2d(wide, wide, 7, padding=3, groups=wide, bias=False), *_normed(wide, dim, 1)
        )
        self.conv1 = Timed(*_normed(dim, _RATIO * dim, 3))
        self.conv2 = Timed(*_normed(_RATIO * dim, dim, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.separate(spikes(self.expand(spikes(x))))
        out: Tensor = x + self.conv2(spikes(self.conv1(spikes(x))))
        return out


class SpikeAttention(nn.Module):
    """Spike-driven self-attention without softmax, ``q (k^T v)`` (the paper's SDSA-3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (_spread(dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = spikes(x)
        # (T, N, heads, d, HW)
        q, k, v = (
            spikes(layer(x)).flatten(3).unflatten(2, (_HEADS, -1))
            for layer in (self.q, self.k, self.v)
        )
        mixed = (v @ k.transpose(-2, -1)) @ q * _ATTENTION_SCALE
        mixed = mixed.flatten(2, 3).unflatten(3, (height, width))
        out: Tensor = self.proj(spikes(mixed, _ATTENTION_THRESHOLD))
        return out


class TransformerBlock(nn.Module):
    """``x += SDSA(x); x += MLP(x)``, spikes before each layer; (T, N, C, H, W)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = SpikeAttention(dim)
        self.fc1 = Timed(*_normed(dim, _RATIO * dim, 1, bias=True))
        self.fc2 = Timed(*_normed(_RATIO * dim, dim, 1, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        out: Tensor = x + self.fc2(spikes(self.fc1(spikes(x))))
        return out


class Down(nn.Module):
    """A convolution between stages, on spikes; (T, N, C, H, W) to (T, N, C', H', W')."""

    def __init__(self, dim: int, out: int, stride: int = 2) -> None:
        super().__init__()
        self.conv = Timed(*_normed(dim, out, 3, stride=stride, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(spikes(x))
        return out


class MetaSpikeFormer(nn.Module):
    """Float32 (N, 3, S, S) to (N, classes), the mean over the steps; strides 2, 4, 8, 16, 16."""

    def __init__(
        self,
        dims: tuple[int, int, int, int],
        num_classes: int,
        *,
        depths: tuple[int, int] = _DEPTHS,
        steps: int = _STEPS,
    ) -> None:
        super().__init__()
        first, second, third, fourth = dims
        self.num_classes, self.steps = num_classes, steps
        self.stem = nn.Sequential(*_normed(3, first // 2, 7, stride=2, bias=True))
        self.blocks = nn.Sequential(
            ConvBlock(first // 2),
            Down(first // 2, first),
            ConvBlock(first),
            Down(first, second),
            ConvBlock(second),
            ConvBlock(second),
            Down(second, third),
            *(TransformerBlock(third) for _ in range(depths[0])),
            Down(third, fourth, stride=1),
            *(TransformerBlock(fourth) for _ in range(depths[1])),
        )
        self.head = nn.Linear(fourth, num_classes)
        self.apply(draw_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # the image is the same at each step: once is enough
        x = self.blocks(torch.stack([x] * self.steps))
        scores: Tensor = self.head(spikes(x.mean((3, 4)))).mean(0)
        return scores


@register_backbone(
    "Meta-SpikeFormer",
    {
        "meta_spikeformer_15m": Variant(
            paper_name="Meta-SpikeFormer 15M", params_m=15.1, headline=True
        ),
        "meta_spikeformer_31m": Variant(paper_name="Meta-SpikeFormer 31M", params_m=31.3),
        "meta_spikeformer_55m": Variant(paper_name="Meta-SpikeFormer 55M", params_m=55.4),
    },
    doc=241,
)
def meta_spikeformer(variant: str, *, num_classes: int, img_size: int) -> nn.Module:
    """Build a Meta-SpikeFormer of four steps; sizes are multiples of 16 pixels."""
    check_side("Meta-SpikeFormer", img_size, multiple=16)
    return MetaSpikeFormer(_DIMS[variant], num_classes)
