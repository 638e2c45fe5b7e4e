"""I&S-ViT's shift-uniform-log2 quantiser, with an honest number of levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.log_grid import LogCandidates, LogQuantizer, fit_log
from deploykit.quant.quantizers.registry import register_quantizer, require_supported
from deploykit.quant.quantizers.table import upper_ends

__all__ = ["ETAS", "Sulq"]

ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
# A constant tensor has no range of logarithms; finer codes than this would only lose digits.
_MIN_STEP = 2.0**-10


@register_quantizer("sulq")
@dataclass(frozen=True)
class Sulq:
    """Uniform codes of ``-log2(x + eta)``, each read back as a power of two less ``eta``.

    I&S-ViT, arXiv 2311.10126, eqs. 9 and 10: ``q = UQ(-log2(x + eta), bits)`` and
    ``x^ = 2**round(-DUQ(q)) - eta``, ``eta`` by squared error. There are ``2**bits`` codes with an
    integer zero point, where the authors' program has one more of them (``clamp(0, n_levels)``)
    and a fractional zero point. Rounding the exponent gives several codes the same value, so a
    wide quantiser has far fewer values than codes. Zero is *not* kept: its value is
    ``2**round(log2(eta)) - eta`` or so.
    """

    integer_values: bool = True
    name: ClassVar[str]

    def supports(self, low: float, _high: float, /) -> bool:
        return low >= 0

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> LogQuantizer:
        """See ``ActivationQuantizer.fit``."""
        require_supported(self, histogram, "values >= 0")
        ends = upper_ends(histogram, range_method)
        etas = torch.tensor(ETAS).repeat(len(ends))
        ends = ends.repeat_interleave(len(ETAS))
        first = -(ends + etas).log2()  # of the largest value; the smallest has the last code
        steps = (-(histogram.low[0] + etas).log2() - first) / (2**bits - 1)
        steps = steps.clamp(min=_MIN_STEP)
        zero_point = torch.round(-first / steps)
        codes = torch.arange(2**bits)
        # 2**128 is beyond float32
        exponents = torch.round(-steps[:, None] * (codes - zero_point[:, None])).clamp(max=127)
        candidates = LogCandidates(
            shift=etas,
            rate=1 / steps,
            offset=zero_point,
            values=torch.exp2(exponents) - etas[:, None],
            parameters={"eta": etas, "scale": steps, "zero_point": zero_point},
        )
        return fit_log(self.name, histogram, candidates, integer_values=self.integer_values)
