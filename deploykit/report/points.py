"""What a report measured, joined: one point for each file on each target at each batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deploykit.report.model import Report
from deploykit.types import Accuracy, Artifact, Measurement, ParityRow

__all__ = ["Point", "front", "points"]


@dataclass(frozen=True)
class Point:
    """One file on one target.

    Attributes:
        artifact: the file.
        measurement: its time there; None if nothing timed it.
        accuracy: the comparison with the original; None for the original itself, on untrained
            weights, and where it was not measured.
        top1: percent; None on untrained weights and where it was not measured.
        parity: the file's comparisons with the model it came from.
    """

    artifact: Artifact
    measurement: Measurement | None
    accuracy: Accuracy | None
    top1: float | None
    parity: tuple[ParityRow, ...]

    @property
    def label(self) -> str:
        """Short name of the file: ``original fp32``, ``nncf w8a8``; ours is its bits alone."""
        name, precision = self.artifact.name, self.artifact.precision
        return precision if name == "compressed" else f"{name} {precision}"

    @property
    def target(self) -> str:
        """What ran the file, empty if nothing was timed."""
        return self.measurement.target if self.measurement else ""

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """95 % interval in percent, the original's top-1 taken as it is."""
        if self.accuracy is None:
            return None
        before = self.accuracy.top1_original
        return before - self.accuracy.drop_high, before - self.accuracy.drop_low


def points(report: Report) -> list[Point]:
    """Every timed file, target by target as they were measured; then the files nothing timed."""
    found: list[Point] = []
    timed = set()
    for measurement in report.measurements:
        key = (measurement.artifact, measurement.format)
        artifact = next((a for a in report.artifacts if (a.name, a.format) == key), None)
        if artifact is not None:
            timed.add(key)
            found.append(_point(report, artifact, measurement))
    rest = [a for a in report.artifacts if (a.name, a.format) not in timed]
    return found + [_point(report, artifact, None) for artifact in rest]


def front(costs: Sequence[tuple[float, ...]]) -> list[int]:
    """Indices of the Pareto front: nothing is as good in every cost and better in one.

    Of equal ones, all are on it.
    """

    def beaten(one: tuple[float, ...], others: Iterable[tuple[float, ...]]) -> bool:
        return any(
            other != one and all(a <= b for a, b in zip(other, one, strict=True))
            for other in others
        )

    return [index for index, one in enumerate(costs) if not beaten(one, costs)]


def _point(report: Report, artifact: Artifact, measurement: Measurement | None) -> Point:
    rated = [a for a in report.accuracy if a.format == artifact.format]
    if measurement is not None:  # the same file may be rated on several targets
        rated = [a for a in rated if a.target in ("", measurement.target)] or rated
    if not report.weights.trained:
        rated = []
    accuracy = next((a for a in rated if a.artifact == artifact.name), None)
    top1 = accuracy.top1 if accuracy else None
    if artifact.name == "original" and rated:
        top1 = rated[0].top1_original
    parity = [
        row for row in report.parity
        if (row.artifact, row.format) == (artifact.name, artifact.format)
    ]  # fmt: skip
    return Point(artifact, measurement, accuracy, top1, tuple(parity))
