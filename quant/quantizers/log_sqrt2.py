"""RepQ-ViT's logarithmic quantiser with base sqrt(2), for softmax outputs at 4 bits and below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.log_grid import LogQuantizer, fit_power
from deploykit.quant.quantizers.registry import register_quantizer, require_supported

__all__ = ["LogSqrt2"]


@register_quantizer("log-sqrt2")
@dataclass(frozen=True)
class LogSqrt2:
    """``2**bits`` values: 0 and ``scale * 2**(-k / 2)`` for k = 0 .. 2**bits - 2; zero is kept.

    RepQ-ViT, arXiv 2212.08254, eq. 11, with the last code given to zero.
    """

    integer_values: bool = True
    name: ClassVar[str]

    def supports(self, low: float, _high: float, /) -> bool:
        return low >= 0

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> LogQuantizer:
        """See ``ActivationQuantizer.fit``."""
        require_supported(self, histogram, "values >= 0")
        return fit_power(
            self.name, histogram, bits, range_method, 2, integer_values=self.integer_values
        )
