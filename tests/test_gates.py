"""Every gate, what it says, and the exit code it ends with."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deploykit.errors import (
    AccuracyGateError,
    DeploykitError,
    ExitCode,
    LatencyGateError,
    MeasurementError,
    ParityError,
    UsageError,
)
from deploykit.report.gates import evaluate_gates, raise_for_gates
from deploykit.types import WeightsOrigin
from tests.factories import TARGET, make_accuracy, make_artifact, make_measurement, make_parity
from tests.factories import make_report as report

UNTRAINED: dict[str, Any] = {"weights": WeightsOrigin(kind="untrained", source="none")}
BAD_PARITY: dict[str, Any] = {"parity": [make_parity(), make_parity(batch=8, passed=False)]}
NOISY: dict[str, Any] = {"measurements": [make_measurement(noisy=True)]}
UNTIMED: dict[str, Any] = {"measurements": []}
BIG_DROP: dict[str, Any] = {"accuracy": [make_accuracy(drop=3.2, drop_low=2.1, drop_high=4.3)]}


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_drop": 0.35},  # at the limit is within it
        {"max_drop": 1, "max_latency_ms": 4.41, "max_bytes": 9_120_345, "max_latency_ratio": 0.5},
        {"max_latency_ms": 5, "target": TARGET},
    ],
)
def test_what_holds_passes(limits: dict[str, Any]) -> None:
    gates = report().check(**limits)
    assert all(gate.passed and gate.exit_code == 0 for gate in gates)
    assert {gate.name for gate in gates} == {"parity", *limits} - {"target"}


def test_a_ratio_is_judged_by_its_own_noise() -> None:
    wandering = report(measurements=[make_measurement(noisy=True, ratio_noisy=False)])
    assert wandering.check(max_latency_ratio=0.5)
    with pytest.raises(MeasurementError, match="median of"):
        wandering.check(max_latency_ms=99)
    torn = report(measurements=[make_measurement(noisy=False, ratio_noisy=True)])
    assert torn.check(max_latency_ms=99)
    with pytest.raises(MeasurementError, match="comparison with the original"):
        torn.check(max_latency_ratio=0.5)


@pytest.mark.parametrize(
    ("overrides", "limits", "error", "code", "words"),
    [
        ({}, {"max_drop": 0.3}, AccuracyGateError, 3, ["−0.35 points", "−0.75 … +0.05", "0.3"]),
        ({}, {"max_latency_ms": 4.4}, LatencyGateError, 4, ["4.41 ms", "4.37 … 4.45", "4.4 ms"]),
        ({}, {"max_latency_ratio": 0.4}, LatencyGateError, 4, ["0.424", "0.415 … 0.433"]),
        ({}, {"max_bytes": 9_000_000}, LatencyGateError, 4, ["9120345", "9000000"]),
        (BAD_PARITY, {}, ParityError, 5, ["batch 8", "top-1 agreement", "wanted SQNR"]),
        (NOISY, {"max_latency_ms": 99}, MeasurementError, 7, ["too noisy", "quiet machine"]),
        (NOISY, {"max_latency_ratio": 9}, MeasurementError, 7, ["too noisy"]),
        (UNTRAINED, {"max_drop": 99}, UsageError, 2, ["untrained", "--weights"]),
        ({"accuracy": []}, {"max_drop": 99}, UsageError, 2, ["not measured", "--data"]),
        (UNTIMED, {"max_latency_ms": 9}, UsageError, 2, ["not measured", "--targets"]),
        ({"artifacts": []}, {"max_bytes": 9}, UsageError, 2, ["no compressed artefact"]),
    ],
)
def test_what_fails(
    overrides: dict[str, Any],
    limits: dict[str, Any],
    error: type[DeploykitError],
    code: int,
    words: list[str],
) -> None:
    with pytest.raises(error) as caught:
        report(**overrides).check(**limits)
    assert caught.value.exit_code == code
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_nan_passes_no_gate() -> None:
    nan = report(accuracy=[make_accuracy(drop=math.nan)])
    with pytest.raises(AccuracyGateError):
        nan.check(max_drop=100)


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (BAD_PARITY | BIG_DROP | NOISY, ParityError),
        (BIG_DROP | NOISY, AccuracyGateError),
        (BIG_DROP, AccuracyGateError),
        (NOISY | {"accuracy": []}, MeasurementError),
        ({"accuracy": []}, LatencyGateError),
    ],
)
def test_the_most_serious_failure_decides(
    overrides: dict[str, Any], error: type[DeploykitError]
) -> None:
    with pytest.raises(error) as caught:
        report(**overrides).check(max_drop=1, max_latency_ms=1)
    assert "max_drop" in str(caught.value)  # all failures are named
    assert "max_latency_ms" in str(caught.value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
@pytest.mark.parametrize("name", ["max_drop", "max_latency_ms", "max_bytes", "max_latency_ratio"])
def test_impossible_limits(name: str, value: float) -> None:
    limits: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=f"{name}: wanted a positive number"):
        report().check(**limits)


def test_zero_drop_is_a_limit_and_zero_ms_is_not() -> None:
    with pytest.raises(AccuracyGateError):
        report().check(max_drop=0)
    with pytest.raises(UsageError):
        report().check(max_latency_ms=0)


def test_targets() -> None:
    slow = make_measurement(target="cpu-openvino", p50_ms=20.0)
    two = report(measurements=[make_measurement(), slow])
    two.check(max_latency_ms=10)  # the first one measured
    with pytest.raises(LatencyGateError, match="cpu-openvino"):
        two.check(max_latency_ms=10, target="cpu-openvino")
    with pytest.raises(UsageError, match="did you mean cpu-openvino"):
        two.check(max_latency_ms=10, target="cpu-openvin")
    with pytest.raises(UsageError, match="measured: none"):
        report(**UNTIMED).check(target="gpu")


def test_no_worse_than_the_baseline() -> None:
    gates = report().check(baseline=report())
    assert [g.name for g in gates] == [
        "parity",
        "baseline_top1",
        "baseline_bytes",
        "baseline_latency_ratio",
    ]


@pytest.mark.parametrize(
    ("overrides", "limits", "error", "words"),
    [
        ({"accuracy": [make_accuracy(top1=78.5)]}, {}, AccuracyGateError, "78.50 %"),
        ({"accuracy": [make_accuracy(top1=78.9)]}, {"max_drop": 0.1}, AccuracyGateError, "0.1"),
        ({"artifacts": [make_artifact(bytes=9_300_000)]}, {}, LatencyGateError, "9300000"),
        (
            {"measurements": [make_measurement(ratio=0.5, ratio_low=0.44, ratio_high=0.56)]},
            {},
            LatencyGateError,
            "0.440 … 0.560",
        ),
        (NOISY, {}, MeasurementError, "too noisy"),
        ({"model": "deit_tiny"}, {}, UsageError, "same model"),
        ({"accuracy": []}, {}, UsageError, "this report has no accuracy"),
        ({"accuracy": [make_accuracy(images=100)]}, {}, UsageError, "same images"),
        ({"accuracy": [make_accuracy(data="other")]}, {}, UsageError, "same images"),
        ({"measurements": [make_measurement(batch=8)]}, {}, UsageError, "batch 8 here"),
        ({"measurements": [make_measurement(ratio=None)]}, {}, UsageError, "was not measured"),
        ({"measurements": [make_measurement(target="gpu")]}, {}, UsageError, "no latency ratio"),
        ({"artifacts": []}, {}, UsageError, "no compressed artefact"),
    ],
)
def test_worse_than_the_baseline(
    overrides: dict[str, Any], limits: dict[str, Any], error: type[DeploykitError], words: str
) -> None:
    with pytest.raises(error) as caught:
        report(**overrides).check(baseline=report(), **limits)
    assert words in str(caught.value)


def test_the_baseline_may_be_measured_on_a_faster_machine() -> None:
    # Twice the milliseconds, the same ratio; a ratio that the intervals can explain passes too.
    slow = make_measurement(p50_ms=9.0, ratio=0.44, ratio_low=0.43, ratio_high=0.45)
    report(measurements=[slow]).check(baseline=report())


def test_bad_baselines() -> None:
    with pytest.raises(UsageError, match="the baseline has no accuracy"):
        report().check(baseline=report(**UNTRAINED))
    with pytest.raises(MeasurementError, match="the baseline's latency is too noisy"):
        report().check(baseline=report(**NOISY))
    with pytest.raises(UsageError, match="the baseline has no compressed"):
        report().check(baseline=report(artifacts=[]))


def test_two_reports_without_accuracy_say_that_they_were_not_compared() -> None:
    gates = report(**UNTRAINED).check(baseline=report(**UNTRAINED))
    top1 = next(g for g in gates if g.name == "baseline_top1")
    assert top1.passed and top1.value is None and "not compared" in top1.reason


def test_evaluate_judges_without_raising() -> None:
    gates = evaluate_gates(report(**BAD_PARITY), max_drop=0.1, max_latency_ms=1)
    assert [g.exit_code for g in gates] == [ExitCode.PARITY, ExitCode.ACCURACY, ExitCode.LATENCY]
    raise_for_gates(g for g in gates if g.passed)
    assert evaluate_gates(report(parity=[])) == []
