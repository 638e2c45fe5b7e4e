"""The sensitivity report as data: sensitivity.json is this model, versioned."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deploykit.report.model import strict_json
from deploykit.types import Data, WeightsOrigin

__all__ = ["Budget", "Collapse", "LayerRow", "SensitivityReport"]


class LayerRow(Data):
    """One layer or attention matmul, each width scored with the rest of the network in float."""

    layer: str
    op: str
    weights: int = Field(description="number of weights")
    scores: dict[str, float] = Field(description="by bits; lower is better, 0 is no loss")
    sqnr_db: dict[str, float] = Field(description="of its own output, by bits")
    chosen: str | None = Field(default=None, description="bits in the recipe made here")


class Collapse(Data):
    """A layer that should not be quantised like the others, and what to do about it."""

    layer: str
    bits: str
    score: float
    share: float = Field(description="of the sum of all layers' scores at these bits")
    sqnr_db: float
    reason: str
    keep: str = Field(description="bits to keep it at instead: wNaM or float")


class Budget(Data):
    """What the allocation was to keep, and what it came to."""

    kind: Literal["avg-bits", "max-bytes", "max-latency-ms"]
    limit: float
    spent: float
    method: Literal["ilp", "greedy"]
    score: float = Field(description="sum of the chosen scores")
    note: str = ""


class SensitivityReport(Data):
    """Every layer's scores, the layers that collapse, and the allocation if one was asked for."""

    schema_version: Literal[1] = 1
    deploykit_version: str
    command: str
    started: str = Field(description="UTC, ISO 8601")
    seconds: float
    model: str
    weights: WeightsOrigin
    metric: Literal["kl", "sqnr", "fisher", "lrp"]
    metric_text: str
    calibration: str
    images: int
    bits: list[str] = Field(description="all widths that occur, widest first")
    layers: list[LayerRow]
    collapse: list[Collapse] = Field(default_factory=list)
    budget: Budget | None = None
    base_bits: str = Field(description="quantize.bits of the recipe made here")
    layer_bits: dict[str, str] = Field(description="quantize.layer_bits of the recipe made here")
    warnings: list[str] = Field(default_factory=list)
    exit_code: int = 0

    def worst(self, count: int = 10) -> list[LayerRow]:
        """The layers with the largest score at any of their widths, worst first."""
        ordered = sorted(self.layers, key=lambda row: -max(row.scores.values(), default=0.0))
        return ordered[:count]

    def to_json(self) -> str:
        """Strict JSON; a non-finite number as "Infinity" or "-Infinity", as in report.json."""
        return strict_json(self)
