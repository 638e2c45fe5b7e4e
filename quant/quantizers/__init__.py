"""Activation quantisers, one file each. Importing this package registers them all."""

from deploykit.quant.quantizers import log_sqrt2, uniform
from deploykit.quant.quantizers.registry import (
    ActivationQuantizer,
    get_quantizer,
    list_quantizers,
    register_quantizer,
)

__all__ = [
    "ActivationQuantizer",
    "get_quantizer",
    "list_quantizers",
    "log_sqrt2",
    "register_quantizer",
    "uniform",
]
