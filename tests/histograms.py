"""Tensors of the kinds that quantisers meet, and their histograms."""

from __future__ import annotations

import torch
from torch import Tensor

from deploykit.quant.observers import TENSOR_BINS, Histogram
from deploykit.quant.quantizers import get_quantizer, list_quantizers
from deploykit.quant.quantizers.registry import FittedQuantizer

KINDS = ("softmax", "gelu", "signed")
METHODS = ("minmax", "percentile", "percentile-mse")


def histogram_of(values: Tensor) -> Histogram:
    values = values.flatten()
    low, high = values.min(), values.max()
    index = ((values - low) * (TENSOR_BINS / (high - low if high > low else 1.0))).long()
    counts = torch.bincount(index.clamp(0, TENSOR_BINS - 1), minlength=TENSOR_BINS)
    return Histogram(low[None], high[None], counts.float()[None])


def values_of(kind: str, seed: int = 0, size: int = 4000) -> Tensor:
    """Softmax or GELU outputs, or skewed values of both signs."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "softmax":
        return torch.softmax(torch.randn(size // 40, 40, generator=generator) * 3, 1).flatten()
    if kind == "gelu":
        return torch.nn.functional.gelu(torch.randn(size, generator=generator) * 1.5)
    return torch.randn(size, generator=generator).exp() - 0.7


def fit(
    name: str, values: Tensor, bits: int, method: str = "percentile", **fields: object
) -> FittedQuantizer:
    """Fitted to the values; ``fields`` are those of the quantiser's class."""
    quantizer = get_quantizer(name)
    if fields:
        quantizer = type(quantizer)(**fields)
    return quantizer.fit(histogram_of(values), bits, method)


def takes(name: str, values: Tensor) -> bool:
    return get_quantizer(name).supports(float(values.min()), float(values.max()))


def pairs() -> list[tuple[str, str]]:
    """Every quantiser with every kind of values it takes."""
    return [(n, kind) for n in list_quantizers() for kind in KINDS if takes(n, values_of(kind))]


def has_table(name: str) -> bool:
    return hasattr(get_quantizer(name), "integer_values")
