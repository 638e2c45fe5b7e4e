"""The report of a model split by classes, as data: split.json is this model, versioned."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from deploykit.report.model import strict_json
from deploykit.types import Accuracy, Artifact, Data, Measurement, WeightsOrigin

__all__ = ["PartRow", "SplitReport"]


class PartRow(Data):
    """One sub-model: a device's own file."""

    name: str
    classes: list[int]
    report: Path = Field(description="of the sub-model's own run")
    artifact: Artifact
    scale: float = Field(description="of its logits in the ensemble")
    offset: float = Field(description="added to them")
    accuracy: Accuracy | None = Field(default=None, description="on images of its classes alone")
    measurement: Measurement | None = None


class SplitReport(Data):
    """The sub-models, and what they are together, beside the original."""

    schema_version: Literal[1] = 1
    deploykit_version: str
    command: str
    started: str = Field(description="UTC, ISO 8601")
    seconds: float
    model: str
    weights: WeightsOrigin
    bits: str
    target: str
    fitted_on: str = Field(description="images the ensemble's scales and offsets come from")
    original: Artifact
    original_measurement: Measurement | None
    parts: list[PartRow]
    accuracy: Accuracy | None = Field(default=None, description="of the ensemble")
    max_drop: float | None = None
    warnings: list[str] = Field(default_factory=list)
    exit_code: int = 0

    @property
    def bytes(self) -> int:
        """Of all parts' files."""
        return sum(part.artifact.bytes for part in self.parts)

    @property
    def largest_bytes(self) -> int:
        """Of the largest part: what a device must hold."""
        return max(part.artifact.bytes for part in self.parts)

    @property
    def parallel_ratio(self) -> float | None:
        """Time of the slowest part against the original's: every part on a device of its own."""
        ratios = self._ratios()
        return max(ratios) if ratios else None

    @property
    def serial_ratio(self) -> float | None:
        """Time of all parts, one after the other on one device, against the original's."""
        ratios = self._ratios()
        return sum(ratios) if ratios else None

    def _ratios(self) -> list[float]:
        found = [p.measurement.ratio for p in self.parts if p.measurement is not None]
        ratios = [ratio for ratio in found if ratio is not None]
        return ratios if len(ratios) == len(self.parts) else []

    def to_json(self) -> str:
        """Strict JSON."""
        return strict_json(self)
