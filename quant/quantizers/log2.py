"""The base-2 logarithmic quantiser: powers of two, which hardware multiplies by shifting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.log_grid import LogQuantizer, fit_power
from deploykit.quant.quantizers.registry import register_quantizer, require_supported

__all__ = ["Log2"]


@register_quantizer("log2")
@dataclass(frozen=True)
class Log2:
    """``2**bits`` values: 0 and ``scale * 2**-k`` for k = 0 .. 2**bits - 2; zero is kept.

    FQ-ViT, arXiv 2111.13824, eq. 12, with the last code given to zero. The base sets a floor: the
    error doesn't fall beyond about 4 bits.
    """

    integer_values: bool = True
    name: ClassVar[str]

    def supports(self, low: float, _high: float, /) -> bool:
        return low >= 0

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> LogQuantizer:
        """See ``ActivationQuantizer.fit``."""
        require_supported(self, histogram, "values >= 0")
        return fit_power(
            self.name, histogram, bits, range_method, 1, integer_values=self.integer_values
        )
