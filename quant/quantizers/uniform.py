"""The uniform quantiser: equal steps, an integer zero point, exactly ``2**bits`` codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from deploykit.graph.ops import fake_quantize, quantize_codes
from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.registry import register_quantizer
from deploykit.quant.ranges import RangeMethod, activation_range

__all__ = ["UniformQuantizer"]


@dataclass(frozen=True)
class UniformQuantizer:
    """``x^ = scale * (clip(round(x / scale) + zero_point, 0, 2**bits - 1) - zero_point)``."""

    scale: float
    zero_point: int
    bits: int

    def codes(self, x: Tensor) -> Tensor:
        """The codes, float32 holding integers of ``0 .. 2**bits - 1``, in the shape of ``x``."""
        return quantize_codes(x, self.scale, self.zero_point, self.bits)

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, fake_quantize(x, self.scale, self.zero_point, self.bits))

    def insert(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        target = torch.ops.deploykit.fake_quantize.default
        return graph.call_function(target, (node, self.scale, self.zero_point, self.bits))

    def describe(self) -> dict[str, Any]:
        return {"kind": "uniform", "scale": self.scale, "zero_point": self.zero_point}


@register_quantizer("uniform")
class Uniform:
    """Fits a uniform grid to a tensor, by min-max or by percentile search; zero is kept."""

    name: ClassVar[str]

    def supports(self, _low: float, _high: float, /) -> bool:
        return True

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> UniformQuantizer:
        """See ``ActivationQuantizer.fit``."""
        method = cast(RangeMethod, range_method)
        found = activation_range(histogram, bits, method)
        return UniformQuantizer(float(found.scale[0]), int(found.zero_point[0]), bits)
