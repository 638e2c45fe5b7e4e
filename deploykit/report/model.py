"""The report as data: report.json is this model, versioned."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from deploykit.errors import UsageError
from deploykit.report.gates import evaluate_gates, raise_for_gates
from deploykit.types import (
    REPORT_SCHEMA_VERSION,
    STAGES,
    Accuracy,
    Artifact,
    Data,
    FeatureLevel,
    Fidelity,
    GateResult,
    LayerProfile,
    Measurement,
    ParityRow,
    PassRecord,
    Preprocessing,
    WeightsOrigin,
)

__all__ = [
    "OWN_ARTIFACTS",
    "LayerError",
    "Report",
    "json_schema",
    "load_report",
    "schema_text",
    "strict_json",
]

OWN_ARTIFACTS = ("original", *STAGES, "compressed")
"""The files a run answers for; any other is there to be compared with."""

_MAX_BYTES = 64_000_000


class LayerError(Data):
    """How much one quantised layer's own output differs from the float layer's (simulation)."""

    layer: str
    op: str
    bits: str
    sqnr_db: float


class Report(Data):
    """Everything one run found out. Nothing in it was typed by hand."""

    schema_version: Literal[1] = 1
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
    accuracy: list[Accuracy] = Field(default_factory=list)
    levels: list[FeatureLevel] = Field(
        default_factory=list, description="feature maps, of a model that gives no scores"
    )
    fidelity: list[Fidelity] = Field(default_factory=list)
    parity: list[ParityRow] = Field(default_factory=list)
    measurements: list[Measurement] = Field(default_factory=list)
    gates: list[GateResult] = Field(default_factory=list)
    layers: list[LayerError] = Field(default_factory=list)
    layer_times: list[LayerProfile] = Field(default_factory=list)
    passes: list[PassRecord] = Field(default_factory=list)
    environment: dict[str, Any]
    recipe: dict[str, Any]
    warnings: list[str] = Field(default_factory=list)
    exit_code: int = 0

    @property
    def original(self) -> Artifact:
        """The float file everything is compared with."""
        return self._artifact("original")

    @property
    def compressed(self) -> Artifact:
        """The file that ships."""
        return self._artifact("compressed")

    @property
    def own_parity(self) -> list[ParityRow]:
        """Parity of the files the run answers for."""
        return [row for row in self.parity if row.artifact in OWN_ARTIFACTS]

    @property
    def simulated(self) -> bool:
        """The compressed file was lowered from a graph that torch can run."""
        compressed = self.find_artifact("compressed")
        return compressed is None or not compressed.algorithm.startswith("nncf")

    def find_artifact(self, name: str) -> Artifact | None:
        """The artefact of that name, if this run got as far as writing it."""
        return next((a for a in self.artifacts if a.name == name), None)

    def find_accuracy(self, artifact: str) -> Accuracy | None:
        """The accuracy of an artefact, if it was measured."""
        return next((a for a in self.accuracy if a.artifact == artifact), None)

    def find_measurement(self, artifact: str, target: str) -> Measurement | None:
        """Latency and memory of an artefact on a target, if measured."""
        return next(
            (m for m in self.measurements if (m.artifact, m.target) == (artifact, target)), None
        )

    def check(
        self,
        max_drop: float | None = None,
        max_latency_ms: float | None = None,
        *,
        max_bytes: int | None = None,
        max_latency_ratio: float | None = None,
        min_sqnr_db: float | None = None,
        baseline: Report | None = None,
        target: str | None = None,
        targets: Sequence[str] | None = None,
    ) -> list[GateResult]:
        """Judge all limits (see ``evaluate_gates``) and give the gates if every one holds.

        Raises:
            ParityError: A file does not compute what it should, whatever the limits.
            AccuracyGateError: More points lost than ``max_drop``, or worse than the baseline.
            LatencyGateError: Slower, or bigger, than a limit or the baseline allows.
            MeasurementError: A latency to be judged is too noisy.
            UsageError: A limit cannot be judged: untrained weights, accuracy or target not
                measured, a baseline of another model or other images.
        """
        gates = evaluate_gates(
            self,
            max_drop=max_drop,
            max_latency_ms=max_latency_ms,
            max_bytes=max_bytes,
            max_latency_ratio=max_latency_ratio,
            min_sqnr_db=min_sqnr_db,
            baseline=baseline,
            target=target,
            targets=targets,
        )
        raise_for_gates(gates)
        return gates

    def to_json(self) -> str:
        """The text of report.json: strict JSON, a non-finite number as "NaN" or "Infinity"."""
        # Hundreds of samples, one a line, would make the file unreadable. No text holds a raw
        # newline in JSON, so only lists of numbers match.
        return re.sub(r"\[\n[-+\d.eE,\s]*\]", lambda m: " ".join(m[0].split()), strict_json(self))

    def _artifact(self, name: str) -> Artifact:
        artifact = self.find_artifact(name)
        if artifact is None:
            names = ", ".join(a.name for a in self.artifacts) or "none"
            raise UsageError(f"this report has no artefact {name!r}; it has: {names}")
        return artifact


def load_report(path: Path | str) -> Report:
    """Read a report.json, or the one in a folder.

    Raises:
        UsageError: It is missing, no report, or of an earlier or later schema version.
    """
    path = Path(path)
    try:
        path = path / "report.json" if path.is_dir() else path
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise UsageError(f"cannot read report {path}: {reason}; check the path") from exc
    if len(raw) > _MAX_BYTES:
        raise UsageError(f"{path}: wanted a report below 64 MB, got a larger file")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        reason = str(exc).split("\n")[0]
        raise UsageError(f"{path}: wanted a report.json, got no valid JSON: {reason}") from exc
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int:
        raise UsageError(f"{path}: wanted a deploykit report, got JSON without schema_version")
    if version > REPORT_SCHEMA_VERSION:
        raise UsageError(
            f"{path}: the report has schema_version {version}, this deploykit reads up to "
            f"{REPORT_SCHEMA_VERSION}; update deploykit"
        )
    if version < REPORT_SCHEMA_VERSION:
        raise UsageError(
            f"{path}: the report has schema_version {version}, this deploykit reads "
            f"{REPORT_SCHEMA_VERSION}; make the report again, or read it with the deploykit that "
            "made it"
        )
    try:
        return Report.model_validate(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        more = f" and {exc.error_count() - 1} more problems" if exc.error_count() > 1 else ""
        raise UsageError(f"{path}: not a valid report: {where}: {first['msg']}{more}") from exc


def json_schema() -> dict[str, Any]:
    """The JSON schema of report.json, to be published beside it."""
    schema = Report.model_json_schema(mode="serialization", schema_generator=_SchemaWriter)
    name = f"urn:deploykit:report:{REPORT_SCHEMA_VERSION}"
    return {"$schema": _SchemaWriter.schema_dialect, "$id": name, **schema}


def schema_text() -> str:
    """The same as text: what ``deploykit report --schema`` prints."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


class _SchemaWriter(GenerateJsonSchema):
    """Says that a number may be written as a text, as ``to_json`` does with what JSON lacks."""

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        number = super().float_schema(schema)
        return {"anyOf": [number, {"enum": ["NaN", "Infinity", "-Infinity"]}]}


def strict_json(data: Data) -> str:
    """Text that every JSON reader takes; a non-finite number as "NaN" or "Infinity"."""
    plain = _without_nonfinite(data.model_dump(mode="json"))
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _without_nonfinite(value: Any) -> Any:
    """Plain data with the numbers that JSON lacks as texts."""
    if isinstance(value, dict):
        return {key: _without_nonfinite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
