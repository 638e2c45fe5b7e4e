"""Training branches folded into one convolution: equal results, fewer layers.

Ding et al., *RepVGG* (CVPR 2021), section 3.3 and, for dilated branches, *UniRepLKNet* (CVPR
2024), section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fold_batchnorm", "spread_kernel"]


def fold_batchnorm(
    weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the BatchNorm after it folded in, by running statistics.

    ``weight`` has its output channels first, any number of axes after that.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    if bias is not None:
        shift = shift + bias * scale
    return weight * scale.view(-1, *(1 for _ in weight.shape[1:])), shift


def spread_kernel(weight: Tensor, dilation: int, size: int) -> Tensor:
    """A dilated depthwise kernel (C, 1, k, k) as a dense one (C, 1, size, size), zeros between."""
    unit = torch.ones(1, 1, 1, 1, dtype=weight.dtype, device=weight.device)
    dense = F.conv_transpose2d(weight, unit, stride=dilation)
    return F.pad(dense, [(size - dense.shape[-1]) // 2] * 4)
