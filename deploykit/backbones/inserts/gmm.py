"""GMM: *Toward a Deeper Understanding: RetNet Viewed through Convolution* (2023): a Gaussian
mixture mask on the attention of ViT, DeiT and Swin.

Two parameters a Gaussian, one mixture a layer, all heads alike. Here the weights of the mixture
start at equal parts of 1 and the Gaussians as wide as the map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploykit.backbones.inserts.registry import register_insert

__all__ = ["GaussianMixtureMask"]

_GAUSSIANS = 5
_ATTENTIONS = ("Attention", "WindowAttention")  # timm's, of ViT, DeiT and Swin


class GaussianMixtureMask(nn.Module):
    """Attention (N, heads, L, L) times ``sum_k a_k exp(-d² / (2 s_k²))`` of the tokens' distance d.

    Tokens in front of the map's (class, distillation) have no place: their rows and columns stay.
    The rows aren't normalised again.
    """

    distance: Tensor
    placed: Tensor

    def __init__(self, side: tuple[int, int], prefix: int) -> None:
        super().__init__()
        grid = torch.stack(
            torch.meshgrid(*(torch.arange(n).float() for n in side), indexing="ij")
        ).flatten(1)
        length = prefix + grid.shape[1]
        distance, placed = torch.zeros(length, length), torch.zeros(length, length)
        distance[prefix:, prefix:] = (grid[:, :, None] - grid[:, None, :]).square().sum(0)
        placed[prefix:, prefix:] = 1
        self.register_buffer("distance", distance, persistent=False)
        self.register_buffer("placed", placed, persistent=False)
        self.weight = nn.Parameter(torch.full((_GAUSSIANS,), 1 / _GAUSSIANS))
        self.width = nn.Parameter(torch.linspace(0.5, 1.5, _GAUSSIANS) * max(side))

    def forward(self, attention: Tensor) -> Tensor:
        bells = (-self.distance / (2 * self.width[:, None, None].square())).exp()
        mixture = (self.weight[:, None, None] * bells).sum(0)
        return attention * (mixture * self.placed + (1 - self.placed))


@register_insert("gmm", host="attention of timm's ViT, DeiT or Swin")
def insert(module: nn.Module) -> int:
    """Put a mask behind every softmax: in the place of its dropout, which deployment lacks."""
    embed = getattr(module, "patch_embed", None)
    grid, prefix = getattr(embed, "grid_size", None), getattr(module, "num_prefix_tokens", 0)
    count = 0
    for layer in module.modules():
        if type(layer).__name__ not in _ATTENTIONS or not hasattr(layer, "attn_drop"):
            continue
        if not isinstance(layer.attn_drop, nn.Dropout | nn.Identity):
            continue
        windowed = type(layer).__name__ == "WindowAttention"
        side = getattr(layer, "window_size", None) if windowed else grid
        if side is None:
            continue
        layer.attn_drop = GaussianMixtureMask(tuple(side), 0 if windowed else prefix)
        count += 1
    return count
