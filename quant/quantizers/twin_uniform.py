"""PTQ4ViT's twin uniform quantiser: half the codes on a fine grid, half on a coarse one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from deploykit.graph.ops import fake_quantize_twin, twin_codes
from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.registry import register_quantizer, require_supported
from deploykit.quant.quantizers.table import best_candidate, onto_bytes, settle, upper_ends
from deploykit.quant.ranges import MIN_SCALE

__all__ = ["TwinQuantizer", "TwinUniform"]

_SPLITS = 12  # the finest split of softmax outputs: 2**-12 of the maximum
_RATIOS = 8  # GELU's two steps differ by up to 2**8, either way


@dataclass(frozen=True)
class TwinQuantizer:
    """Two grids of ``2**(bits - 1)`` codes each, which meet at ``split``.

    Attributes:
        bits: width of the codes.
        split: the first value of the upper grid.
        low_step, high_step: steps below and above it.
        values: ``2**bits`` floats, none falling.
        step, zero_point: the 8-bit grid the values lie on, or 0.0 and 0 if they are any floats.
    """

    bits: int
    split: float
    low_step: float
    high_step: float
    values: tuple[float, ...]
    step: float
    zero_point: int

    def _arguments(self) -> tuple[float, float, float, list[float], float, int]:
        return (
            self.split, self.low_step, self.high_step,
            list(self.values), self.step, self.zero_point,
        )  # fmt: skip

    def codes(self, x: Tensor) -> Tensor:
        """The codes, float32 holding integers of ``0 .. 2**bits - 1``, in the shape of ``x``."""
        return twin_codes(x, self.split, self.low_step, self.high_step, len(self.values) - 1)

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, fake_quantize_twin(x, *self._arguments()))

    def insert(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        target = torch.ops.deploykit.fake_quantize_twin.default
        return graph.call_function(target, (node, *self._arguments()))

    def describe(self) -> dict[str, Any]:
        return {
            "kind": TwinUniform.name,
            "split": self.split,
            "low_step": self.low_step,
            "high_step": self.high_step,
            "integer_values": self.step > 0,
        }


@register_quantizer("twin-uniform")
@dataclass(frozen=True)
class TwinUniform:
    """A fine grid where most values are, a coarse one for the few large ones; zero is kept.

    PTQ4ViT, arXiv 2111.12293, section 3.2. Values >= 0 (softmax): the grids share
    [0, ``split``) and [``split``, maximum], ``split`` being ``2**-m`` of the maximum. The paper's
    upper grid starts at 0, which leaves its codes below ``split`` unused; here it starts at
    ``split``, so that all ``2**bits`` codes have values of their own. Both signs (GELU): ``split``
    is 0 and the negative step ``2**-m`` times the positive one. ``m`` and the maximum are
    searched.
    """

    integer_values: bool = True
    name: ClassVar[str]

    def supports(self, low: float, high: float, /) -> bool:
        return low >= 0 or high > 0

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> TwinQuantizer:
        """See ``ActivationQuantizer.fit``."""
        require_supported(self, histogram, "values that aren't all negative")
        ends, half = upper_ends(histogram, range_method)[:, None], 2 ** (bits - 1)
        if float(histogram.low[0]) >= 0:
            split = ends * torch.exp2(-torch.arange(1.0, _SPLITS + 1))
            low_step, high_step = split / half, (ends - split) / (half - 1)
        else:
            ratios = torch.exp2(-torch.arange(-_RATIOS, _RATIOS + 1.0))
            split, high_step = torch.zeros(len(ends), len(ratios)), ends / (half - 1)
            low_step, high_step = high_step * ratios, high_step.expand(-1, len(ratios))
        split, low_step, high_step = (part.reshape(-1, 1) for part in (split, low_step, high_step))
        # A step below this is noise, and dividing by it overflows.
        low_step, high_step = low_step.clamp(min=MIN_SCALE), high_step.clamp(min=MIN_SCALE)
        codes = torch.arange(-half, half)
        values = split + torch.where(codes < 0, low_step, high_step) * codes
        return self._choose(histogram, split, low_step, high_step, values)

    def _choose(
        self, histogram: Histogram, split: Tensor, low_step: Tensor, high_step: Tensor,
        values: Tensor,
    ) -> TwinQuantizer:  # fmt: skip
        last = values.shape[1] - 1
        if self.integer_values:
            values, steps, zero_points = onto_bytes(values)
        else:
            steps = zero_points = torch.zeros(len(values), 1)

        def code_of(x: Tensor, some: slice) -> Tensor:
            return twin_codes(x, split[some], low_step[some], high_step[some], last)

        best = best_candidate(histogram, values, code_of)
        at, low, high = float(split[best]), float(low_step[best]), float(high_step[best])
        settled = settle(
            values[best], partial(twin_codes, split=at, low_step=low, high_step=high, last=last)
        )
        return TwinQuantizer(
            bits=last.bit_length(),
            split=at,
            low_step=low,
            high_step=high,
            values=tuple(settled.tolist()),
            step=float(steps[best]),
            zero_point=int(zero_points[best]),
        )
