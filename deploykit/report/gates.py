"""Limits: does the artefact hold them, and which exit code says that it does not.

A gate is judged on the figure measured in the artefact; the interval is said beside it. What
cannot be judged (no labelled images, untrained weights, no such measurement) never passes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from deploykit.errors import (
    AccuracyGateError,
    DeploykitError,
    ExitCode,
    LatencyGateError,
    MeasurementError,
    ParityError,
    UsageError,
)
from deploykit.report.wording import bytes_text, clean, drop_sentence, interval, ms, percent
from deploykit.types import Accuracy, Artifact, GateResult, Measurement

if TYPE_CHECKING:
    from deploykit.report.model import Report

__all__ = ["BASELINE_MAX_DROP", "evaluate_gates", "failed_gates", "raise_for_gates"]

BASELINE_MAX_DROP = 0.5
"""Points that top-1 may lie below the baseline's when no ``max_drop`` is given."""

_BASELINE_MAX_GROWTH = 1.01
_ROUNDING = 1e-9  # 100 * (1 - 0.995) is a little more than 0.5

# Most serious first: a file that computes something else makes its accuracy meaningless, and a
# latency of a model that is wrong is of no interest.
_ERRORS: dict[ExitCode, type[DeploykitError]] = {
    ExitCode.PARITY: ParityError,
    ExitCode.ACCURACY: AccuracyGateError,
    ExitCode.LATENCY: LatencyGateError,
    ExitCode.MEASUREMENT: MeasurementError,
    ExitCode.USAGE: UsageError,
}


def evaluate_gates(
    report: Report,
    *,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    max_bytes: int | None = None,
    max_latency_ratio: float | None = None,
    baseline: Report | None = None,
    target: str | None = None,
) -> list[GateResult]:
    """Judge every limit that is given; parity is always judged.

    Args:
        report: The run to judge; its artefact is the one named ``compressed``.
        max_drop: Percentage points of top-1 that may be lost. With a baseline it also bounds
            how far top-1 may lie below the baseline's (0.5 when not given).
        max_latency_ms: Limit of the median latency on ``target``.
        max_bytes: Limit of the file's size. A file too big shares the latency gate's exit code.
        max_latency_ratio: Limit of median latency over the original's; comparable across
            machines, as the two were measured interleaved.
        baseline: An earlier report to be no worse than in top-1, size (1 %) and latency ratio.
        target: Where latency is judged; the first one measured if None.

    Raises:
        UsageError: A limit is not a positive number, or the target was not measured.
    """
    _check_limits(
        max_drop=max_drop,
        max_latency_ms=max_latency_ms,
        max_bytes=max_bytes,
        max_latency_ratio=max_latency_ratio,
    )
    measured = _measured_on(report, target)
    gates = [_parity(report)] if report.own_parity else []
    if max_drop is not None:
        gates.append(_drop(report, max_drop))
    if max_latency_ms is not None:
        gates.append(_latency(measured, max_latency_ms))
    if max_latency_ratio is not None:
        gates.append(_ratio(measured, max_latency_ratio))
    if max_bytes is not None:
        gates.append(_size("max_bytes", report.find_artifact("compressed"), max_bytes, "the limit"))
    if baseline is not None:
        allowed = BASELINE_MAX_DROP if max_drop is None else max_drop
        gates += _against(report, baseline, allowed, measured)
    return gates


def raise_for_gates(gates: Iterable[GateResult]) -> None:
    """Raise the error of the most serious failed gate; its one line names all that failed.

    Raises:
        ParityError, AccuracyGateError, LatencyGateError, MeasurementError, UsageError: in this
            order of precedence.
    """
    failed = failed_gates(gates)
    if failed:
        error = _ERRORS[ExitCode(failed[0].exit_code)]
        raise error("; ".join(f"{gate.name}: {gate.reason}" for gate in failed))


def failed_gates(gates: Iterable[GateResult]) -> list[GateResult]:
    """Those that don't hold, the most serious first: its exit code is the run's."""
    order = list(_ERRORS)
    failed = [gate for gate in gates if not gate.passed]
    return sorted(failed, key=lambda gate: order.index(ExitCode(gate.exit_code)))


def _check_limits(**limits: float | None) -> None:
    for name, limit in limits.items():
        least_is_wrong = limit is not None and (
            not math.isfinite(limit) or limit < 0 or (limit == 0 and name != "max_drop")
        )
        if least_is_wrong:
            raise UsageError(f"{name}: wanted a positive number, got {limit}")


def _measured_on(report: Report, target: str | None) -> Measurement | None:
    measured = {m.target: m for m in reversed(report.measurements) if m.artifact == "compressed"}
    if target is None:
        return next((m for m in report.measurements if m.artifact == "compressed"), None)
    if target in measured:
        return measured[target]
    near = difflib.get_close_matches(target, measured, n=1)
    hint = f"did you mean {near[0]}?" if near else f"measured: {', '.join(measured) or 'none'}"
    raise UsageError(f"target {target!r} was not measured in this report; {hint}")


def _gate(name: str, limit: float, value: float, error: ExitCode, reason: str) -> GateResult:
    passed = value <= limit + _ROUNDING  # a NaN fails
    exit_code = ExitCode.OK if passed else error
    return GateResult(
        name=name, limit=limit, value=value, passed=passed, reason=reason, exit_code=int(exit_code)
    )


def _cannot(name: str, limit: float, reason: str, error: ExitCode = ExitCode.USAGE) -> GateResult:
    return GateResult(
        name=name, limit=limit, value=None, passed=False, reason=reason, exit_code=int(error)
    )


def _parity(report: Report) -> GateResult:
    missed = [row for row in report.own_parity if not row.passed]
    if missed:
        reason = "; ".join(
            f"{row.artifact} differs from {row.reference} on {row.runtime}, batch {row.batch}: "
            f"max {row.max_abs:.3g}, top-1 agreement {percent(row.top1_agreement)}, "
            f"wanted {row.tolerance}"
            for row in missed
        )
    else:
        reason = f"all {len(report.own_parity)} comparisons within their tolerance"
    return _gate("parity", 0, len(missed), ExitCode.PARITY, clean(reason))


def _drop(report: Report, limit: float) -> GateResult:
    if not report.weights.trained:
        return _cannot(
            "max_drop", limit, "the weights are untrained, so there is no accuracy; give --weights"
        )
    found = [a for a in report.accuracy if a.artifact == "compressed"]
    accuracy = max(found, key=lambda a: a.drop, default=None)  # of the worst file
    if accuracy is None:
        return _cannot("max_drop", limit, "accuracy was not measured; give labelled images, --data")
    word = "is within" if accuracy.drop <= limit + _ROUNDING else "is beyond"
    reason = f"{drop_sentence(accuracy)}, {word} the limit of {limit:g} points"
    return _gate("max_drop", limit, accuracy.drop, ExitCode.ACCURACY, reason)


def _timed(
    name: str,
    limit: float,
    measurement: Measurement | None,
    judge: Callable[[Measurement], GateResult],
) -> GateResult:
    """Judge a latency, unless there is none or it is too noisy to be judged."""
    if measurement is None:
        return _cannot(name, limit, "latency was not measured; give --targets")
    if measurement.noisy:
        reason = (
            f"the median of {ms(measurement.p50_ms)} ms on {measurement.target} is too noisy to "
            f"judge (95 % interval {interval(measurement)} ms); measure again on a quiet machine"
        )
        return _cannot(name, limit, reason, ExitCode.MEASUREMENT)
    return judge(measurement)


def _latency(measurement: Measurement | None, limit: float) -> GateResult:
    def judge(m: Measurement) -> GateResult:
        reason = (
            f"median {ms(m.p50_ms)} ms (95 % interval {interval(m)}) on {m.target}, "
            f"limit {limit:g} ms"
        )
        return _gate("max_latency_ms", limit, m.p50_ms, ExitCode.LATENCY, reason)

    return _timed("max_latency_ms", limit, measurement, judge)


def _ratio(measurement: Measurement | None, limit: float) -> GateResult:
    def judge(m: Measurement) -> GateResult:
        if m.ratio is None:
            return _cannot(
                "max_latency_ratio", limit, f"the original was not measured on {m.target}"
            )
        reason = (
            f"{m.ratio:.3f} of the original's time ({_ratio_interval(m)}) on {m.target}, "
            f"limit {limit:g}"
        )
        return _gate("max_latency_ratio", limit, m.ratio, ExitCode.LATENCY, reason)

    return _timed("max_latency_ratio", limit, measurement, judge)


def _ratio_interval(m: Measurement) -> str:
    if m.ratio_low is None or m.ratio_high is None:
        return "no interval"
    return f"95 % interval {m.ratio_low:.3f} … {m.ratio_high:.3f}"


def _size(name: str, artifact: Artifact | None, limit: float, of: str) -> GateResult:
    if artifact is None:
        return _cannot(name, limit, "this report has no compressed artefact")
    reason = f"{bytes_text(artifact.bytes)} ({artifact.bytes} bytes), {of} {limit:.0f} bytes"
    return _gate(name, limit, artifact.bytes, ExitCode.LATENCY, reason)


def _against(
    report: Report, baseline: Report, allowed: float, measured: Measurement | None
) -> list[GateResult]:
    if report.model != baseline.model:
        raise UsageError(
            f"the baseline is of {clean(baseline.model)}, this report of {clean(report.model)}; "
            "give a baseline of the same model"
        )
    gates = [_top1_against(report, baseline, allowed)]
    old = baseline.find_artifact("compressed")
    if old is None:
        gates.append(_cannot("baseline_bytes", 0, "the baseline has no compressed artefact"))
    else:
        limit = old.bytes * _BASELINE_MAX_GROWTH
        of = f"the baseline's {old.bytes} bytes and 1 % make"
        gates.append(_size("baseline_bytes", report.find_artifact("compressed"), limit, of))
    if measured is not None:
        gates.append(_ratio_against(measured, baseline))
    return gates


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
        return _cannot(name, allowed, f"{which} has no accuracy; evaluate both with --data")
    if (new.data, new.images) != (old.data, old.images):
        reason = (
            f"measured on {clean(new.data)} ({new.images} images), the baseline on "
            f"{clean(old.data)} ({old.images} images); evaluate both on the same images"
        )
        return _cannot(name, allowed, reason)
    reason = (
        f"top-1 {percent(new.top1)}, the baseline {percent(old.top1)}, on {new.images} images; "
        f"at most {allowed:g} points below are allowed"
    )
    return _gate(name, allowed, old.top1 - new.top1, ExitCode.ACCURACY, reason)


def _trusted_accuracy(report: Report) -> Accuracy | None:
    return report.find_accuracy("compressed") if report.weights.trained else None


def _ratio_against(measurement: Measurement, baseline: Report) -> GateResult:
    name = "baseline_latency_ratio"
    old = baseline.find_measurement("compressed", measurement.target)
    if old is None or old.ratio_high is None:
        return _cannot(name, 0, f"the baseline has no latency ratio on {measurement.target}")
    limit, old_interval = old.ratio_high, _ratio_interval(old)
    if old.noisy:
        reason = "the baseline's latency is too noisy to compare with; measure it again"
        return _cannot(name, limit, reason, ExitCode.MEASUREMENT)
    if old.batch != measurement.batch:
        reason = f"batch {measurement.batch} here, {old.batch} in the baseline; measure the same"
        return _cannot(name, limit, reason)

    def judge(m: Measurement) -> GateResult:
        if m.ratio is None or m.ratio_low is None:
            return _cannot(name, limit, f"the original was not measured on {m.target}")
        # Only a difference that the two intervals cannot explain is a regression.
        reason = (
            f"{m.ratio:.3f} of the original's time ({_ratio_interval(m)}) on {m.target}, "
            f"the baseline {old.ratio or limit:.3f} ({old_interval})"
        )
        return _gate(name, limit, m.ratio_low, ExitCode.LATENCY, reason)

    return _timed(name, limit, measurement, judge)
