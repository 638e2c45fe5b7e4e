"""The report as data: report.json is this model, versioned."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deploykit.errors import (
    AccuracyGateError,
    ExitCode,
    LatencyGateError,
    MeasurementError,
    UsageError,
)
from deploykit.types import (
    REPORT_SCHEMA_VERSION,
    Accuracy,
    Artifact,
    Data,
    GateResult,
    Measurement,
    ParityRow,
    PassRecord,
    Preprocessing,
    WeightsOrigin,
)

__all__ = ["LayerError", "Report", "load_report"]


class LayerError(Data):
    """How much one quantised layer's own output differs from the float layer's (simulation)."""

    layer: str
    op: str
    bits: str
    sqnr_db: float


class Report(Data):
    """Everything one run found out. Nothing in it was typed by hand."""

    schema_version: Literal[1] = REPORT_SCHEMA_VERSION
    deploykit_version: str
    command: str
    started: str = Field(description="UTC, ISO 8601")
    seconds: float
    model: str
    parameters: int
    macs: int | None = None
    preprocessing: Preprocessing
    weights: WeightsOrigin
    bits: str
    calibration: str = Field(description="what the ranges were read from, and how many images")
    verdict: Literal["ok", "failed", "not for deployment", "accuracy not measured"]
    verdict_reasons: list[str]
    artifacts: list[Artifact]
    accuracy: list[Accuracy] = []
    parity: list[ParityRow] = []
    measurements: list[Measurement] = []
    gates: list[GateResult] = []
    layers: list[LayerError] = []
    passes: list[PassRecord] = []
    environment: dict[str, Any]
    recipe: dict[str, Any]
    warnings: list[str] = []
    exit_code: int = 0
