"""Limits: does the artefact hold them, and which exit code says that it does not.

A gate is judged on the figure measured in the artefact; the interval is said beside it. What
cannot be judged (no labelled images, untrained weights, no such measurement) never passes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

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
from deploykit.types import Artifact, GateResult, Measurement, ParityRow

if TYPE_CHECKING:
    from deploykit.report.model import Report

__all__ = [
    "TargetLimits",
    "cannot",
    "evaluate_gates",
    "failed_gates",
    "gate",
    "raise_for_gates",
    "ratio_interval",
    "size",
    "timed",
]

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


class TargetLimits(NamedTuple):
    """Limits of one target's latency; None takes what holds for all."""

    max_latency_ms: float | None = None
    max_latency_ratio: float | None = None


def evaluate_gates(
    report: Report,
    *,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    max_bytes: int | None = None,
    max_latency_ratio: float | None = None,
    min_sqnr_db: float | None = None,
    baseline: Report | None = None,
    target: str | None = None,
    targets: Sequence[str] | Mapping[str, TargetLimits] | None = None,
) -> list[GateResult]:
    """Judge every limit that is given; parity is always judged.

    Args:
        report: The run to judge; its artefact is the one named ``compressed``.
        max_drop: Percentage points of top-1 that may be lost. With a baseline it also bounds
            how far top-1 may lie below the baseline's (0.5 when not given).
        max_latency_ms: Limit of the median latency on every target judged.
        max_bytes: Limit of the file's size. A file too big shares the latency gate's exit code.
        max_latency_ratio: Limit of median latency over the original's; comparable across
            machines, as the two were measured interleaved.
        min_sqnr_db: Of a model that gives feature maps: least SQNR of any of them against the
            original file's, on real images. It shares the accuracy gate's exit code.
        baseline: An earlier report to be no worse than in top-1, size (1 %) and latency ratio.
        target: Where latency is judged; the first one measured if None.
        targets: Several of them instead, each with a gate of its own and the size of the file it
            runs; ``["all"]`` means all that were measured. A mapping has limits of their own.

    Raises:
        UsageError: A limit is not a positive number, or a target was not measured.
    """
    from deploykit.report.baseline import against

    own = dict(targets) if isinstance(targets, Mapping) else {}
    _check_limits(
        max_drop=max_drop,
        max_latency_ms=max_latency_ms,
        max_bytes=max_bytes,
        max_latency_ratio=max_latency_ratio,
    )
    for limits in own.values():
        _check_limits(**limits._asdict())
    if target is not None and targets is not None:
        raise UsageError("give either one target or several targets")
    measured = _several(report, list(targets)) if targets else [_measured_on(report, target)]
    gates = [_parity(report)] if report.own_parity else []
    if max_drop is not None:
        gates.append(_drop(report, max_drop))
    if min_sqnr_db is not None:
        gates.append(_fidelity(report, min_sqnr_db))
    # One target's gates have plain names; of several, each has the target's beside it.
    many = len(measured) > 1
    for m in measured:
        limits = own.get(m.target if m else "", TargetLimits())
        limit_ms = max_latency_ms if limits.max_latency_ms is None else limits.max_latency_ms
        ratio = limits.max_latency_ratio
        ratio = max_latency_ratio if ratio is None else ratio
        suffix = f"[{m.target}]" if many and m else ""
        if limit_ms is not None:
            gates.append(_latency(f"max_latency_ms{suffix}", m, limit_ms))
        if ratio is not None:
            gates.append(_ratio(f"max_latency_ratio{suffix}", m, ratio))
    formats = dict.fromkeys(m.format for m in measured if m) if many else [None]
    for one in formats:
        suffix = f"[{one}]" if one and len(list(formats)) > 1 else ""
        if max_bytes is not None:
            gates.append(size(f"max_bytes{suffix}", _file(report, one), max_bytes, "the limit"))
    if baseline is not None:
        gates += against(report, baseline, max_drop, measured)
    return gates


def _file(report: Report, format_: str | None) -> Artifact | None:
    """The compressed file of a format; the first one if None."""
    return next(
        (a for a in report.artifacts if a.name == "compressed" and format_ in (None, a.format)),
        None,
    )


def _several(report: Report, names: Sequence[str]) -> list[Measurement | None]:
    if "all" in names:
        found = {m.target: m for m in reversed(report.measurements) if m.artifact == "compressed"}
        names = [n for n in dict.fromkeys(m.target for m in report.measurements) if n in found]
        if not names:
            return [None]
    return [_measured_on(report, name) for name in dict.fromkeys(names)]


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


def gate(name: str, limit: float, value: float, error: ExitCode, reason: str) -> GateResult:
    """A limit that was judged; ``error`` is the exit code where it does not hold."""
    passed = value <= limit + _ROUNDING  # a NaN fails
    exit_code = ExitCode.OK if passed else error
    return GateResult(
        name=name, limit=limit, value=value, passed=passed, reason=reason, exit_code=int(exit_code)
    )


def cannot(name: str, limit: float, reason: str, error: ExitCode = ExitCode.USAGE) -> GateResult:
    """A limit that can't be judged, and so does not hold."""
    return GateResult(
        name=name, limit=limit, value=None, passed=False, reason=reason, exit_code=int(error)
    )


def _parity(report: Report) -> GateResult:
    missed = [row for row in report.own_parity if not row.passed]
    if missed:
        reason = "; ".join(
            f"{' '.join(filter(None, (row.artifact, row.level)))} differs from {row.reference} "
            f"on {row.runtime}, batch {row.batch}: max {row.max_abs:.3g}, {_agreement(row)}"
            f"wanted {row.tolerance}"
            for row in missed
        )
    else:
        reason = f"all {len(report.own_parity)} comparisons within their tolerance"
    return gate("parity", 0, len(missed), ExitCode.PARITY, clean(reason))


def _agreement(row: ParityRow) -> str:
    return "" if row.top1_agreement is None else f"top-1 agreement {percent(row.top1_agreement)}, "


def _fidelity(report: Report, limit: float) -> GateResult:
    """The worst map of the worst compressed file; as with accuracy, real images are wanted."""
    name = "min_sqnr_db"
    found = [row for row in report.fidelity if row.artifact == "compressed"]
    if not found:
        return cannot(name, limit, "the model gives no feature maps to compare; leave it out")
    worst = min(found, key=lambda row: row.sqnr_db)
    if worst.data.startswith("synthetic"):
        return cannot(name, limit, "it was measured on synthetic images; give --data or --calib")
    passed = worst.sqnr_db >= limit - _ROUNDING
    word = "holds" if passed else "is below"
    said = (
        f"{worst.level} has {worst.sqnr_db:.1f} dB in the {worst.format} file on {worst.target} "
        f"({worst.images} images), which {word} the limit of {limit:g} dB"
    )
    return GateResult(
        name=name, limit=limit, value=worst.sqnr_db, passed=passed, reason=said,
        exit_code=int(ExitCode.OK if passed else ExitCode.ACCURACY),
    )  # fmt: skip


def _drop(report: Report, limit: float) -> GateResult:
    if report.levels:
        return cannot("max_drop", limit, "feature maps have no classes; give min_sqnr_db")
    if not report.weights.trained:
        return cannot(
            "max_drop", limit, "the weights are untrained, so there is no accuracy; give --weights"
        )
    found = [a for a in report.accuracy if a.artifact == "compressed"]
    accuracy = max(found, key=lambda a: a.drop, default=None)  # of the worst file
    if accuracy is None:
        return cannot("max_drop", limit, "accuracy was not measured; give labelled images, --data")
    word = "is within" if accuracy.drop <= limit + _ROUNDING else "is beyond"
    reason = f"{drop_sentence(accuracy)}, {word} the limit of {limit:g} points"
    return gate("max_drop", limit, accuracy.drop, ExitCode.ACCURACY, reason)


def timed(
    name: str,
    limit: float,
    measurement: Measurement | None,
    judge: Callable[[Measurement], GateResult],
    *,
    ratio: bool = False,
) -> GateResult:
    """Judge a latency, or its ratio, unless there is none or it is too noisy to be judged.

    A machine whose pace wanders can leave the ratio sharp and the median not, and the other way
    round.
    """
    if measurement is None:
        return cannot(name, limit, "latency was not measured; give --targets")
    if measurement.comparison_noisy if ratio else measurement.noisy:
        what, spread = (
            ("comparison with the original", ratio_interval(measurement))
            if ratio
            else (
                f"median of {ms(measurement.p50_ms)} ms",
                f"95 % interval {interval(measurement)} ms",
            )
        )
        reason = (
            f"the {what} on {measurement.target} is too noisy to judge ({spread}); measure again "
            "on a quiet machine"
        )
        return cannot(name, limit, reason, ExitCode.MEASUREMENT)
    return judge(measurement)


def _latency(name: str, measurement: Measurement | None, limit: float) -> GateResult:
    def judge(m: Measurement) -> GateResult:
        reason = (
            f"median {ms(m.p50_ms)} ms (95 % interval {interval(m)}) on {m.target}, "
            f"limit {limit:g} ms"
        )
        return gate(name, limit, m.p50_ms, ExitCode.LATENCY, reason)

    return timed(name, limit, measurement, judge)


def _ratio(name: str, measurement: Measurement | None, limit: float) -> GateResult:
    def judge(m: Measurement) -> GateResult:
        if m.ratio is None:
            return cannot(name, limit, f"the original was not measured on {m.target}")
        reason = (
            f"{m.ratio:.3f} of the original's time ({ratio_interval(m)}) on {m.target}, "
            f"limit {limit:g}"
        )
        return gate(name, limit, m.ratio, ExitCode.LATENCY, reason)

    return timed(name, limit, measurement, judge, ratio=True)


def ratio_interval(m: Measurement) -> str:
    """``95 % interval 0.415 … 0.433``."""
    if m.ratio_low is None or m.ratio_high is None:
        return "no interval"
    return f"95 % interval {m.ratio_low:.3f} … {m.ratio_high:.3f}"


def size(name: str, artifact: Artifact | None, limit: float, of: str) -> GateResult:
    """A file's bytes against a limit."""
    if artifact is None:
        return cannot(name, limit, "this report has no compressed artefact")
    reason = f"{bytes_text(artifact.bytes)} ({artifact.bytes} bytes), {of} {limit:.0f} bytes"
    return gate(name, limit, artifact.bytes, ExitCode.LATENCY, reason)
