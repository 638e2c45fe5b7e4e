"""Activation quantisers, one file each. Importing this package registers them all."""

from deploykit.quant.quantizers import adalog, log2, log_sqrt2, sulq, twin_uniform, uniform
from deploykit.quant.quantizers.registry import (
    ActivationQuantizer,
    FittedQuantizer,
    get_quantizer,
    list_quantizers,
    register_quantizer,
)

__all__ = [
    "ActivationQuantizer",
    "FittedQuantizer",
    "adalog",
    "get_quantizer",
    "list_quantizers",
    "log2",
    "log_sqrt2",
    "register_quantizer",
    "sulq",
    "twin_uniform",
    "uniform",
]
