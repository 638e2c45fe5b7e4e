"""No worse than an earlier report: top-1, size, and latency as a ratio to the original's.

Ratios compare across machines, as original and compressed were timed in turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deploykit.errors import ExitCode, UsageError
from deploykit.report.gates import cannot, gate, ratio_interval, size, timed
from deploykit.report.wording import change, clean, percent
from deploykit.types import Accuracy, Artifact, GateResult, Measurement

if TYPE_CHECKING:
    from deploykit.report.model import Report

__all__ = ["BASELINE_MAX_DROP", "against"]

BASELINE_MAX_DROP = 0.5
"""Points that top-1 may lie below the baseline's when no ``max_drop`` is given."""

_BASELINE_MAX_GROWTH = 1.01


def against(
    report: Report,
    baseline: Report,
    max_drop: float | None,
    measured: Sequence[Measurement | None],
) -> list[GateResult]:
    """Gates of top-1, size and latency ratio, no worse than the baseline's.

    Args:
        max_drop: points that top-1 may lie below; ``BASELINE_MAX_DROP`` if None.
        measured: the compressed file on every target to be judged.

    Raises:
        UsageError: the baseline is of another model.
    """
    allowed = BASELINE_MAX_DROP if max_drop is None else max_drop
    if report.model != baseline.model:
        raise UsageError(
            f"the baseline is of {clean(baseline.model)}, this report of {clean(report.model)}; "
            "give a baseline of the same model"
        )
    gates = [_top1_against(report, baseline, allowed)]
    many = len(measured) > 1
    formats = list(dict.fromkeys(m.format for m in measured if m)) if many else [None]
    for one in formats:
        suffix = f"[{one}]" if one and len(formats) > 1 else ""
        gates.append(_size_against(f"baseline_bytes{suffix}", report, baseline, one))
    for m in measured:
        if m is not None:
            suffix = f"[{m.target}]" if many else ""
            gates.append(_ratio_against(f"baseline_latency_ratio{suffix}", m, baseline))
    return gates


def _size_against(name: str, report: Report, baseline: Report, format_: str | None) -> GateResult:
    def file(of: Report) -> Artifact | None:
        files = [a for a in of.artifacts if a.name == "compressed"]
        return next((a for a in files if format_ in (None, a.format)), None)

    old = file(baseline)
    if old is None:
        which = f"compressed {format_} file" if format_ else "compressed artefact"
        return cannot(name, 0, f"the baseline has no {which}")
    limit = old.bytes * _BASELINE_MAX_GROWTH
    return size(name, file(report), limit, f"the baseline's {old.bytes} bytes and 1 % make")


def _top1_against(report: Report, baseline: Report, allowed: float) -> GateResult:
    name = "baseline_top1"
    new, old = _trusted_accuracy(report), _trusted_accuracy(baseline)
    if new is None and old is None:
        return GateResult(
            name=name,
            limit=allowed,
            value=None,
            passed=True,
            reason="not compared: neither report has an accuracy",
        )
    if new is None or old is None:
        which = "this report" if new is None else "the baseline"
        return cannot(name, allowed, f"{which} has no accuracy; evaluate both with --data")
    if (new.data, new.images) != (old.data, old.images):
        reason = (
            f"measured on {clean(new.data)} ({new.images} images), the baseline on "
            f"{clean(old.data)} ({old.images} images); evaluate both on the same images"
        )
        return cannot(name, allowed, reason)
    reason = (
        f"top-1 {percent(new.top1)}, the baseline {percent(old.top1)}, on {new.images} images; "
        f"at most {allowed:g} points below are allowed (against their float files: "
        f"{_lost(new)}, the baseline {_lost(old)})"
    )
    return gate(name, allowed, old.top1 - new.top1, ExitCode.ACCURACY, reason)


def _lost(accuracy: Accuracy) -> str:
    low, high = change(-accuracy.drop_high), change(-accuracy.drop_low)
    return f"{change(-accuracy.drop)} points, 95 % interval {low} … {high}"


def _trusted_accuracy(report: Report) -> Accuracy | None:
    return report.find_accuracy("compressed") if report.weights.trained else None


def _ratio_against(name: str, measurement: Measurement, baseline: Report) -> GateResult:
    old = baseline.find_measurement("compressed", measurement.target)
    if old is None or old.ratio_high is None:
        return cannot(name, 0, f"the baseline has no latency ratio on {measurement.target}")
    limit, before = old.ratio_high, old
    if old.comparison_noisy:
        reason = "the baseline's latency is too noisy to compare with; measure it again"
        return cannot(name, limit, reason, ExitCode.MEASUREMENT)
    if old.batch != measurement.batch:
        reason = f"batch {measurement.batch} here, {old.batch} in the baseline; measure the same"
        return cannot(name, limit, reason)

    def judge(m: Measurement) -> GateResult:
        if m.ratio is None or m.ratio_low is None:
            return cannot(name, limit, f"the original was not measured on {m.target}")
        elsewhere = clean(before.device.device) != clean(m.device.device)
        reason = (
            f"{m.ratio:.3f} of the original's time ({ratio_interval(m)}) on {m.target}, "
            f"the baseline {before.ratio or limit:.3f} ({ratio_interval(before)})"
            + (" on another machine" if elsewhere else "")
            + f": {_compared(m, before)}"
        )
        return gate(name, limit, m.ratio_low, ExitCode.LATENCY, reason)

    return timed(name, limit, measurement, judge, ratio=True)


def _compared(new: Measurement, old: Measurement) -> str:
    """Only a difference that the two intervals cannot explain is a regression."""
    assert new.ratio is not None and new.ratio_low is not None and old.ratio_high is not None
    if new.ratio_low > old.ratio_high:
        return "slower, and the intervals don't meet: noise can't explain it"
    if old.ratio_low is not None and new.ratio_high is not None and new.ratio_high < old.ratio_low:
        return "faster, and the intervals don't meet"
    return "no difference that the intervals can't explain"
