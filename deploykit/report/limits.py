"""Limits as a file in the repository: ``deploykit check OUT --limits gates.yaml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deploykit._recipe_section import Section, UserPath
from deploykit._validated_yaml import load_validated
from deploykit.report.gates import TargetLimits

__all__ = ["LimitsFile", "TargetSection", "load_limits"]


class TargetSection(Section):
    """Limits of one target's latency, in place of those for all."""

    max_latency_ms: float | None = Field(default=None, gt=0)
    max_latency_ratio: float | None = Field(default=None, gt=0, description="of the original's")


class LimitsFile(Section):
    """What a report is held to. Every key may be left out."""

    version: Literal[1] = 1
    max_drop: float | None = Field(default=None, ge=0, description="percentage points of top-1")
    max_latency_ms: float | None = Field(default=None, gt=0)
    max_latency_ratio: float | None = Field(default=None, gt=0, description="of the original's")
    max_bytes: int | None = Field(default=None, gt=0)
    min_sqnr_db: float | None = Field(
        default=None, description="of feature maps against the original's"
    )
    baseline: UserPath | None = Field(
        default=None, description="an earlier report to be no worse than, from this file's folder"
    )
    targets: dict[str, TargetSection | None] = Field(
        default_factory=dict, description="targets to judge, with limits of their own if any"
    )

    @property
    def target_limits(self) -> dict[str, TargetLimits]:
        """As ``evaluate_gates`` takes them."""
        return {
            name: TargetLimits() if one is None else TargetLimits(**one.model_dump())
            for name, one in self.targets.items()
        }

    def with_options(self, **options: Any) -> LimitsFile:
        """The same with what the command line gives laid over it."""
        return self.model_copy(update={k: v for k, v in options.items() if v is not None})


def load_limits(path: Path) -> LimitsFile:
    """Read and check a limits file.

    Raises:
        UsageError: it can't be read, a key is unknown, a value is no limit.
    """
    limits = load_validated(path, LimitsFile)
    if limits.baseline is None:
        return limits
    return limits.with_options(baseline=path.parent / limits.baseline)
