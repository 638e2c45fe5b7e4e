"""Deformable convolution in plain operators.

Dai et al., *Deformable Convolutional Networks* (ICCV 2017).

One ``grid_sample`` and one strided convolution, which every exporter has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DeformablePatches"]


class DeformablePatches(nn.Module):
    """A deformable K x K convolution of stride K: float32 (N, C, H, W) to (N, D, H/K, W/K).

    Each output position reads K² points, each where its place in the patch and a learned offset
    point to, bilinearly and with zeros outside the map (eq. 2). The points of a position stand
    below each other in the sampled map, (N, C, K² H/K, W/K), and a (K², 1) convolution of stride
    K² reads them.

    Args:
        shape: (H, W) of the map, multiples of K.
    """

    home: Tensor
    scale: Tensor

    def __init__(self, dim: int, out: int, shape: tuple[int, int], kernel: int = 2) -> None:
        super().__init__()
        points = kernel * kernel
        self.points = points
        self.offset = nn.Conv2d(dim, 2 * points, kernel, kernel)
        self.reset_offsets()
        self.conv = nn.Conv2d(dim, out, (points, 1), (points, 1), bias=False)
        height, width = shape
        rows = (
            torch.arange(height).reshape(-1, kernel, 1, 1).expand(-1, -1, width // kernel, kernel)
        )
        columns = (
            torch.arange(width).reshape(1, 1, -1, kernel).expand(height // kernel, kernel, -1, -1)
        )
        home = torch.stack((rows, columns), dim=-1).permute(0, 1, 3, 2, 4)
        home = home.reshape(1, -1, width // kernel, 2).float()
        self.register_buffer("home", home, persistent=False)
        scale = torch.tensor([2.0 / height, 2.0 / width])
        self.register_buffer("scale", scale, persistent=False)

    def reset_offsets(self) -> None:
        """Let every point stand at its place, as training starts."""
        nn.init.zeros_(self.offset.weight)
        if self.offset.bias is not None:
            nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        offset = self.offset(x).unflatten(1, (self.points, 2))  # (N, K², (dy, dx), H', W')
        offset = offset.permute(0, 3, 1, 4, 2).flatten(1, 2)  # (N, H' K², W', (dy, dx))
        place = (self.home + offset + 0.5) * self.scale - 1  # pixel centres in -1 … 1
        sampled = F.grid_sample(x, place.flip(-1), "bilinear", "zeros", align_corners=False)
        out: Tensor = self.conv(sampled)
        return out
