"""How fresh weights are drawn."""

from __future__ import annotations

from torch import nn

from deploykit._compat import timm

__all__ = ["draw_weights"]


def draw_weights(module: nn.Module) -> None:
    """Draw linear and convolution weights from a normal of deviation 0.02, cut at ±2; biases 0.

    For ``nn.Module.apply``. It is what ViT-like papers train from.
    """
    if isinstance(module, nn.Linear | nn.Conv2d):
        timm.layers.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
