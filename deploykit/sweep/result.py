"""What a sweep found, as data: sweep.json is ``SweepReport``, versioned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deploykit.report.model import Report, strict_json
from deploykit.sweep.spec import Limits, Objective
from deploykit.types import Data

__all__ = ["SweepReport", "TargetTime", "TrialResult", "best_of", "front_of", "read_report"]


class TargetTime(Data):
    """Latency of a trial's file on one target."""

    target: str
    device: str
    p50_ms: float
    ratio: float | None = Field(description="of the original's time")
    ratio_low: float | None
    ratio_high: float | None
    noisy: bool
    pinned_to: list[int]


class TrialResult(Data):
    """One trial: what it tried and what came of it."""

    number: int
    values: dict[str, Any]
    recipe_sha256: str
    folder: str = Field(description="in the sweep's folder")
    state: Literal["complete", "failed"]
    reason: str = Field(default="", description="why it failed, or is beyond a limit")
    same_as: int | None = Field(default=None, description="an earlier trial of the same recipe")
    exit_code: int = 0
    model: str = ""
    top1: float | None = Field(default=None, description="percent; of the worst file")
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None
    bytes: int | None = None
    times: list[TargetTime] = Field(default_factory=list)
    seconds: float = 0.0
    cores: list[int] = Field(default=[], description="the trial's own, on its machine")
    host: str = ""
    started: float = Field(default=0.0, description="seconds since 1970")
    ended: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Of the original's time, on the target where the trial does worst."""
        ratios = [time.ratio for time in self.times if time.ratio is not None]
        return max(ratios) if len(ratios) == len(self.times) and ratios else None

    @property
    def latency_ms(self) -> float | None:
        """The longest median over the targets."""
        return max((time.p50_ms for time in self.times), default=None)

    @property
    def noisy(self) -> bool:
        return any(time.noisy for time in self.times)

    def objective(self, name: Objective) -> float | None:
        value: float | None = getattr(self, name)
        return value

    def beyond(self, limits: Limits) -> str:
        """Which limits the trial misses, in words; empty if none."""
        checks = (
            ("drop", self.drop, limits.max_drop),
            ("ratio", self.ratio, limits.max_ratio),
            ("latency_ms", self.latency_ms, limits.max_latency_ms),
            ("bytes", self.bytes, limits.max_bytes),
        )
        missed = [
            f"{name} {'unknown' if value is None else f'{value:g}'}, limit {limit:g}"
            for name, value, limit in checks
            if limit is not None and (value is None or value > limit)
        ]
        return "; ".join(missed)


class SweepReport(Data):
    """All trials, and those that no other beats."""

    schema_version: Literal[1] = 1
    deploykit_version: str
    command: str
    started: str = Field(description="UTC, ISO 8601; of the last time it was started")
    seconds: float
    key: str = Field(description="of what is swept and how it is chosen")
    sampler: str
    seed: int
    objectives: list[Objective]
    dimensions: dict[str, Any]
    limits: Limits
    trials: list[TrialResult]
    front: list[int] = Field(description="numbers of the trials that no other beats in everything")
    best: dict[str, int] = Field(description="objective, or 'knee': trial that is best in it")
    warnings: list[str] = Field(default_factory=list)

    def trial(self, number: int) -> TrialResult:
        return next(t for t in self.trials if t.number == number)

    def to_json(self) -> str:
        """Strict JSON."""
        return strict_json(self)


def read_report(report: Report) -> dict[str, Any]:
    """What a trial's report says, as fields of ``TrialResult``."""
    compressed = report.find_artifact("compressed")
    rated = [a for a in report.accuracy if a.artifact == "compressed"]
    worst = max(rated, key=lambda a: a.drop, default=None) if report.weights.trained else None
    return {
        "exit_code": report.exit_code,
        "model": report.model,
        "top1": worst and worst.top1,
        "drop": worst and worst.drop,
        "drop_low": worst and worst.drop_low,
        "drop_high": worst and worst.drop_high,
        "bytes": compressed and compressed.bytes,
        "times": [
            {
                "target": m.target,
                "device": m.device.device,
                "p50_ms": m.p50_ms,
                "ratio": m.ratio,
                "ratio_low": m.ratio_low,
                "ratio_high": m.ratio_high,
                "noisy": m.noisy,
                "pinned_to": m.device.pinned_to,
            }
            for m in report.measurements
            if m.artifact == "compressed"
        ],
        "seconds": report.seconds,
    }


def _losses(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> NDArray[np.float64]:
    """(trials, objectives) float64, less is better."""
    signs = np.array([-1.0 if name == "top1" else 1.0 for name in objectives])
    values = np.array([[t.objective(name) for name in objectives] for t in trials], np.float64)
    losses: NDArray[np.float64] = signs * values
    return losses


def front_of(
    trials: Sequence[TrialResult], objectives: Sequence[Objective], limits: Limits
) -> list[int]:
    """Numbers of the trials within the limits that no other is at least as good as in everything
    and better than in something (Pareto). Of trials with the same recipe the first counts.
    """
    able = [
        t
        for t in trials
        if t.state == "complete"
        and t.same_as is None
        and not t.beyond(limits)
        and all(t.objective(name) is not None for name in objectives)
    ]
    if not able:
        return []
    losses = _losses(able, objectives)
    no_worse = (losses[:, None] <= losses[None]).all(-1)
    better = (losses[:, None] < losses[None]).any(-1)
    beaten = np.any(no_worse & better, axis=0)
    return [t.number for index, t in enumerate(able) if not beaten[index]]


def best_of(front: Sequence[TrialResult], objectives: Sequence[Objective]) -> dict[str, int]:
    """Number of the trial that is best in each objective, and of the ``knee``: the one nearest to
    the point that has the best of everything, each objective scaled to 0..1 over the front
    (compromise programming; M. Zeleny, "Multiple Criteria Decision Making", 1973).
    """
    if not front:
        return {}
    losses = _losses(front, objectives)
    span = np.ptp(losses, axis=0)
    scaled = (losses - losses.min(0)) / np.where(span > 0, span, 1)
    chosen = [*losses.argmin(0), np.linalg.norm(scaled, axis=1).argmin()]
    return {
        name: front[int(index)].number
        for name, index in zip([*objectives, "knee"], chosen, strict=True)
    }
