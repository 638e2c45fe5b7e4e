"""ULSAM: Saini et al., *ULSAM: Ultra-Lightweight Subspace Attention Module for Compact
Convolutional Neural Networks* (WACV 2020).

Replaces layers of MobileNetV1 and V2. Which ones is a table of trials in the paper; here it is the
last of each run of blocks that keep both width and size, where a run has two or more.
"""

from __future__ import annotations

from torch import Tensor, nn

from deploykit.backbones.inserts.registry import register_insert

__all__ = ["SubspaceAttentionMaps"]

_SUBSPACES = 4
_BLOCKS = ("DepthwiseSeparableConv", "InvertedResidual")  # timm's, of the MobileNets


class SubspaceAttentionMaps(nn.Module):
    """An attention map for each of g groups of channels; float32 (N, C, H, W) to itself.

    ``A = softmax(PW(maxpool(DW(F))))`` over the places of a map, with one filter PW; then
    ``A F + F`` (section 3).
    """

    def __init__(self, channels: int, subspaces: int = _SUBSPACES) -> None:
        super().__init__()
        self.subspaces = subspaces
        self.depthwise = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.pointwise = nn.Conv2d(channels, subspaces, 1, groups=subspaces, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.pointwise(self.pool(self.depthwise(x)))
        maps = scores.flatten(2).softmax(-1).unflatten(2, x.shape[2:]).unsqueeze(2)
        spaces = x.unflatten(1, (self.subspaces, -1))
        x = (maps * spaces + spaces).flatten(1, 2)
        return x


@register_insert("ulsam", host="runs of MobileNetV1 or V2 blocks that keep width and size")
def insert(module: nn.Module) -> int:
    """Replace the last width-keeping block of every run of two or more."""
    count = 0
    for run in module.modules():
        if not isinstance(run, nn.Sequential):
            continue
        keeping = [(index, c) for index, block in enumerate(run) if (c := _kept(block))]
        if len(keeping) >= 2:
            index, channels = keeping[-1]
            run[index] = SubspaceAttentionMaps(channels)
            count += 1
    return count


def _kept(block: nn.Module) -> int:
    """Channels of a block that has as many after it as before and doesn't stride, else 0."""
    depthwise = getattr(block, "conv_dw", None)
    if type(block).__name__ not in _BLOCKS or not isinstance(depthwise, nn.Conv2d):
        return 0
    convs = [layer for layer in block.children() if isinstance(layer, nn.Conv2d)]
    before, after = convs[0].in_channels, convs[-1].out_channels
    fits = before == after and depthwise.stride == (1, 1) and before % _SUBSPACES == 0
    return before if fits else 0
