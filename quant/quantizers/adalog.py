"""AdaLog: a logarithmic quantiser whose base is fitted, for softmax and GELU outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.log_grid import LogCandidates, LogQuantizer, fit_log
from deploykit.quant.quantizers.registry import register_quantizer, require_supported
from deploykit.quant.quantizers.table import upper_ends

__all__ = ["GELU_SHIFT", "LOWEST", "AdaLog", "adalog_fractions"]

GELU_SHIFT = 0.16997124  # minus the minimum of GELU
LOWEST = -0.171  # what is taken for a GELU output: its approximations dip a little lower
PARTS = 37  # r: the base is 2**(q / r)


def adalog_fractions(q: Tensor, bits: int) -> Tensor:
    """``2**-T1[k] * T2[k]`` for k = 0 .. 2**bits - 1, the values of scale 1 (AdaLog, eq. 9).

    ``T1[k] = floor(k q / r)`` is a shift, and ``T2[k] = 2**(-((k q) mod r) / r)`` is rounded to
    multiples of ``1 / (2**(bits + 1) - 2)``.

    Args:
        q: integers, any shape.

    Returns:
        float32 ``(*q.shape, 2**bits)``.
    """
    products = q[..., None].long() * torch.arange(2**bits)
    multiple = 2 ** (bits + 1) - 2
    mantissa = torch.round(torch.exp2(-(products % PARTS) / PARTS) * multiple) / multiple
    fractions: Tensor = torch.exp2(-(products // PARTS).float()) * mantissa
    return fractions


@register_quantizer("adalog")
@dataclass(frozen=True)
class AdaLog:
    """0 and ``scale * 2**(-k q / 37)`` for k = 0 .. 2**bits - 2; ``q`` and the scale are searched.

    AdaLog, arXiv 2407.12951, eqs. 6 to 9. ``q`` starts at ``lowest_q`` = 1; the authors' program
    starts at 10, too coarse a base at 6 and 8 bits.

    Values as low as GELU's minimum -0.16997 are taken too: 0.16997124 is added before the
    logarithm and subtracted from the table, ``x^ = values[k] - 0.16997124``. The paper leaves that
    shift in and takes it out of the next layer's bias, ``b - 0.16997124 * W^ 1`` with the
    quantised weight ``W^``. In real numbers both are the same, as ``W^ (v - c 1) + b =
    W^ v + (b - c W^ 1)``; in float they differ by the order of the sums only, and here no other
    layer needs to know. Zero is kept by the form without a shift, not by the shifted one.
    """

    integer_values: bool = True
    lowest_q: int = 1
    highest_q: int = 138
    name: ClassVar[str]

    def supports(self, low: float, _high: float, /) -> bool:
        return low >= LOWEST

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> LogQuantizer:
        """See ``ActivationQuantizer.fit``."""
        require_supported(self, histogram, f"values >= {LOWEST}")
        shift = GELU_SHIFT if float(histogram.low[0]) < 0 else 0.0
        ends = upper_ends(histogram, range_method) + shift
        q = torch.arange(self.lowest_q, self.highest_q + 1)
        fractions = adalog_fractions(q, bits)
        fractions[:, -1] = 0
        scale, qs = ends.repeat_interleave(len(q)), q.repeat(len(ends))
        rate = PARTS / qs
        candidates = LogCandidates(
            shift=torch.full_like(scale, shift),
            rate=rate,
            offset=rate * scale.log2(),
            values=(ends[:, None, None] * fractions).flatten(0, 1) - shift,
            parameters={"scale": scale, "q": qs, "shift": torch.full_like(scale, shift)},
        )
        return fit_log(self.name, histogram, candidates, integer_values=self.integer_values)
