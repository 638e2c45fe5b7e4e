"""Making an untrained network worth testing.

Fresh networks are degenerate by design: heads and residual scales start at zero, norms at the
identity, BatchNorm statistics at 0 and 1. Parity, sensitivity and ranges measured on such a
network say nothing, because most of it contributes nothing to the output.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploykit.synthetic import synthetic_images
from deploykit.types import Preprocessing

__all__ = ["make_testable"]

_LAYER_SCALE = re.compile(r"(^|\.)(gamma_?\d*|layer_scale\w*|res_scale\d?|ls\d?)(\.\w+)?$")
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def make_testable(module: nn.Module, seed: int, size: int) -> None:
    """Re-draw in place what an untrained ``module`` has at zero or at the identity.

    Norm weights become U(0.5, 1.5) and norm biases N(0, 0.05²), residual scales 0.5, zero weights
    (heads) N(0, 1/fan_in), other zeros N(0, 0.02²). BatchNorm statistics are then taken from
    synthetic images of ``size`` pixels. The result depends on ``seed`` and on the module alone;
    torch's global random state is left as it was. The module ends in eval mode.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        norms = {id(p) for m in module.modules() if _is_norm(m) for p in m.parameters(False)}
        for owner in module.modules():
            if _is_norm(owner):
                _redraw_norm(owner)
        for name, parameter in module.named_parameters():
            if id(parameter) not in norms:
                _redraw(name, parameter)
        _recalibrate(module, seed, size)
    module.train()  # leaving eval mode drops the bias caches some timm models keep
    module.eval()


def _is_norm(module: nn.Module) -> bool:
    """A layer with its own scale, by kind or by name (timm has many such classes)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and "Norm" in type(module).__name__


def _redraw_norm(module: nn.Module) -> None:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(weight, Tensor):
        weight.uniform_(0.5, 1.5)
    if isinstance(bias, Tensor):
        bias.normal_(0.0, 0.05)


def _redraw(name: str, parameter: Tensor) -> None:
    if not parameter.is_floating_point() or parameter.numel() == 0:
        return
    constant = bool((parameter == parameter.flatten()[0]).all())
    if constant and _LAYER_SCALE.search(name):
        parameter.fill_(0.5)
    elif constant and not parameter.flatten()[0]:
        is_weight = parameter.ndim >= 2 and name.endswith("weight")
        deviation = parameter[0].numel() ** -0.5 if is_weight else 0.02
        parameter.normal_(0.0, deviation)


def _recalibrate(module: nn.Module, seed: int, size: int) -> None:
    """Set BatchNorm's running statistics to those of a batch of synthetic images."""
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return
    module.eval()
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average, not a moving one
        layer.train()
    preprocessing = Preprocessing(size=size, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
    # a head's BatchNorm sees one value per image and channel: it needs a batch
    count = 8 if size <= 288 else 4
    module(synthetic_images(count, preprocessing, seed))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        if layer.running_var is not None:
            # a channel that is silent on these images must not be blown up on others
            layer.running_var.clamp_(min=max(1e-2 * float(layer.running_var.mean()), 1e-5))
    module.eval()
