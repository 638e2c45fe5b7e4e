"""Tiny members of the families that structured pruning knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deploykit._compat import timm
from deploykit.prune.structured_convert import slim_copy
from deploykit.prune.structured_groups import Group
from deploykit.prune.structured_ports import attention_groups
from deploykit.prune.structured_trace import channel_groups
from tests.graphs import SIZE, shake, tiny_cnn, tiny_vit


def tiny_distilled() -> nn.Module:
    """Two classifiers, a class and a distillation token, layer scale."""
    net = timm.models.deit.VisionTransformerDistilled(
        img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10,
        init_values=0.1,
    )  # fmt: skip
    return shake(net).eval()


def tiny_swin() -> nn.Module:
    """Windows, shifts, position tables, a patch merging."""
    net = timm.models.SwinTransformer(
        img_size=SIZE, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
        num_classes=10,
    )  # fmt: skip
    return shake(net).eval()


def tiny_tinyvit() -> nn.Module:
    """Position biases per head; queries, keys and values interleaved."""
    net = timm.models.TinyVit(
        embed_dims=(16, 32, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2),
        window_sizes=(2, 2, 2, 1), num_classes=10,
    )  # fmt: skip
    return shake(net).eval()


def tiny_convnext() -> nn.Module:
    net = timm.models.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(16, 16, 32, 32), num_classes=10, ls_init_value=0.5
    )
    return shake(net).eval()


def tiny_sht() -> nn.Module:
    """SHViT's single-head attention, squeeze-excite and depthwise convolutions."""
    net = timm.models.SHViT(
        num_classes=10, embed_dim=(32, 48, 64), partial_dim=(32, 24, 24), qk_dim=(16, 16, 16),
        depth=(1, 1, 1), types=("i", "s", "s"),
    )  # fmt: skip
    return shake(net).eval()


class PooledNet(nn.Module):
    """Next-ViT's attention: queries, keys and values apart, the latter of pooled tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.norm = nn.BatchNorm1d(32)
        self.attn = timm.models.nextvit.EfficientAttention(32, head_dim=16, sr_ratio=2)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2)
        x = x.transpose(1, 2) + self.attn(self.norm(x).transpose(1, 2))
        return self.head((x + self.mlp(x)).mean(1))


def tiny_pooled() -> nn.Module:
    return shake(PooledNet()).eval()


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (tiny_vit, SIZE),
    "distilled": (tiny_distilled, SIZE),
    "cnn": (tiny_cnn, SIZE),
    "swin": (tiny_swin, SIZE),
    "tinyvit": (tiny_tinyvit, 64),
    "convnext": (tiny_convnext, 64),
    "shvit": (tiny_sht, 64),
    "pooled": (tiny_pooled, SIZE),
}
"""Name: maker and image size."""


def groups_of(module: nn.Module, size: int) -> tuple[nn.Module, list[Group]]:
    """A slim copy and all its groups."""
    example = torch.zeros(1, 3, size, size)
    slim, _ = slim_copy(module, example)
    groups = [g for name, part in slim.named_modules() for g in attention_groups(name, part)]
    return slim, groups + channel_groups(slim, example)[0]
