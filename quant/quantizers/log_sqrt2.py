"""RepQ-ViT's logarithmic quantiser with base sqrt(2), for softmax outputs at 4 bits and below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from deploykit.graph.ops import fake_quantize_log_sqrt2
from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.registry import register_quantizer
from deploykit.quant.ranges import MIN_SCALE, TAILS

__all__ = ["LogSqrt2Quantizer"]


@dataclass(frozen=True)
class LogSqrt2Quantizer:
    """``2**bits`` values: 0 and ``scale * 2**(-k / 2)`` for k = 0 .. 2**bits - 2."""

    scale: float
    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, fake_quantize_log_sqrt2(x, self.scale, self.bits))

    def insert(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        target = torch.ops.deploykit.fake_quantize_log_sqrt2.default
        return graph.call_function(target, (node, self.scale, self.bits))

    def describe(self) -> dict[str, Any]:
        return {"kind": "log-sqrt2", "scale": self.scale}


@register_quantizer("log-sqrt2")
class LogSqrt2:
    """Chooses the scale among upper percentiles by least squared error; often it is about 1."""

    name: str

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> LogSqrt2Quantizer:
        if float(histogram.low[0]) < 0:
            message = f"log-sqrt2 quantises values >= 0, got {float(histogram.low[0]):g}"
            raise ValueError(message)
        centres, counts = histogram.centres[0], histogram.counts[0]
        cumulative = counts.flip(0).cumsum(0)
        best, best_error = float(histogram.high[0]), float("inf")
        for tail in TAILS if range_method != "minmax" else (0.0,):
            dropped = int((cumulative <= tail * counts.sum()).sum()) if tail > 0 else 0
            dropped = min(dropped, len(counts) - 1)
            high = histogram.high[0] - dropped * (histogram.high[0] - histogram.low[0]) / len(
                counts
            )
            scale = max(float(high), MIN_SCALE)
            values = LogSqrt2Quantizer(scale, bits)(centres)
            relative = (values - centres) / max(float(histogram.high[0]), MIN_SCALE)
            error = float((relative.square() * counts).sum())  # relative: no square overflows
            if error < best_error:
                best, best_error = scale, error
        return LogSqrt2Quantizer(max(best, MIN_SCALE), bits)
