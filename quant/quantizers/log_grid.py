"""What the logarithmic quantisers share: the fitted quantiser, and choosing among candidates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from deploykit.graph.ops import fake_quantize_log, log_codes
from deploykit.quant.observers import Histogram
from deploykit.quant.quantizers.table import best_candidate, onto_bytes, settle, upper_ends

__all__ = ["LogCandidates", "LogQuantizer", "fit_log", "fit_power"]

_PHASES = 8


@dataclass(frozen=True)
class LogQuantizer:
    """``values[clip(round(offset - rate * log2(x + shift)), 0, 2**bits - 1)]``.

    Attributes:
        kind: the registered name.
        bits: width of the codes.
        values: ``2**bits`` floats, none rising.
        step, zero_point: the 8-bit grid the values lie on, or 0.0 and 0 if they are any floats.
        parameters: for the report.
    """

    kind: str
    bits: int
    shift: float
    rate: float
    offset: float
    values: tuple[float, ...]
    step: float
    zero_point: int
    parameters: tuple[tuple[str, float], ...]

    def _arguments(self) -> tuple[float, float, float, list[float], float, int]:
        return (self.shift, self.rate, self.offset, list(self.values), self.step, self.zero_point)

    def codes(self, x: Tensor) -> Tensor:
        """The codes, float32 holding integers of ``0 .. 2**bits - 1``, in the shape of ``x``."""
        return log_codes(x, self.shift, self.rate, self.offset, len(self.values) - 1)

    def __call__(self, x: Tensor) -> Tensor:
        return cast(Tensor, fake_quantize_log(x, *self._arguments()))

    def insert(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        target = torch.ops.deploykit.fake_quantize_log.default
        return graph.call_function(target, (node, *self._arguments()))

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, **dict(self.parameters), "integer_values": self.step > 0}


@dataclass(frozen=True)
class LogCandidates:
    """Parameters to choose from.

    Attributes:
        shift, rate, offset: float32 (K,).
        values: float32 (K, 2**bits), the tables.
        parameters: for the report, (K,) each.
    """

    shift: Tensor
    rate: Tensor
    offset: Tensor
    values: Tensor
    parameters: dict[str, Tensor]


def fit_log(
    kind: str, histogram: Histogram, candidates: LogCandidates, *, integer_values: bool
) -> LogQuantizer:
    """The candidate with the least squared error on the histogram.

    Args:
        integer_values: round each table onto an 8-bit grid first, so that the products of the
            quantised tensor can run on integers; the error of that is part of what is compared.
    """
    values = candidates.values
    last = values.shape[1] - 1
    if integer_values:
        values, steps, zero_points = onto_bytes(values)
    else:
        steps = zero_points = torch.zeros(len(values), 1)

    def code_of(x: Tensor, some: slice) -> Tensor:
        shift, rate, offset = (
            part[some, None] for part in (candidates.shift, candidates.rate, candidates.offset)
        )
        return log_codes(x, shift, rate, offset, last)

    best = best_candidate(histogram, values, code_of)
    shift, rate, offset = (
        float(part[best]) for part in (candidates.shift, candidates.rate, candidates.offset)
    )
    settled = settle(
        values[best], partial(log_codes, shift=shift, rate=rate, offset=offset, last=last)
    )
    return LogQuantizer(
        kind=kind,
        bits=last.bit_length(),
        shift=shift,
        rate=rate,
        offset=offset,
        values=tuple(settled.tolist()),
        step=float(steps[best]),
        zero_point=int(zero_points[best]),
        parameters=tuple((name, float(v[best])) for name, v in candidates.parameters.items()),
    )


def fit_power(
    kind: str,
    histogram: Histogram,
    bits: int,
    range_method: str,
    rate: int,
    *,
    integer_values: bool,
) -> LogQuantizer:
    """The grid ``scale * 2**(-k / rate)`` with the last code given to zero; the scale is searched.

    Beside the upper percentiles, scales a fraction of a code below them are tried: where the few
    large values lie between two codes decides the squared error.
    """
    ends = upper_ends(histogram, range_method)
    phases = torch.arange(_PHASES if range_method != "minmax" else 1) / (_PHASES * rate)
    scale = (ends[:, None] * torch.exp2(-phases)).flatten()
    rates = torch.full_like(scale, rate)
    values = scale[:, None] * torch.exp2(-torch.arange(2**bits) / rate)
    values[:, -1] = 0
    candidates = LogCandidates(
        shift=torch.zeros_like(scale),
        rate=rates,
        offset=rates * scale.log2(),
        values=values,
        parameters={"scale": scale},
    )
    return fit_log(kind, histogram, candidates, integer_values=integer_values)
