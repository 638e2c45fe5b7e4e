"""From what was found out to one word, its reasons, and the exit code."""

from __future__ import annotations

from deploykit.errors import ExitCode
from deploykit.placement_search import STEP_NAME
from deploykit.recipe import GatesSection
from deploykit.report.gates import evaluate_gates, failed_gates
from deploykit.report.model import Report

__all__ = ["judge"]


def judge(report: Report, gates: GatesSection) -> Report:
    """The report with gates, verdict, reasons and exit code filled in.

    A missed gate or parity outweighs untrained weights, and these outweigh unmeasured accuracy.
    """
    results = evaluate_gates(
        report,
        max_drop=gates.max_drop,
        max_latency_ms=gates.max_latency_ms,
        min_sqnr_db=gates.min_sqnr_db,
    )
    failed = failed_gates(results)
    reasons = [f"{gate.name}: {gate.reason}" for gate in failed]
    code = ExitCode.OK
    if failed:
        verdict = "failed"
        code = ExitCode(failed[0].exit_code)
    elif not report.weights.trained:
        verdict = "not for deployment"
        reasons.append("the weights are untrained: nothing is known of its accuracy")
        code = ExitCode.UNTRAINED if report.weights.kind == "untrained" else ExitCode.OK
    elif report.levels and gates.min_sqnr_db is not None:
        verdict = "ok"  # by what was asked for: every map is as near to the original's
        reasons += [*_fidelity(report), *_latency(report)]
    elif report.levels:
        verdict = "accuracy not measured"
        reasons += ["feature maps have no classes: test them under their own head"]
        reasons += [*_fidelity(report), *_latency(report)]
    elif not report.accuracy:
        verdict = "accuracy not measured"
        reasons.append("no labelled images were given: give --data DIR")
    else:
        verdict = "ok"
        reasons += [_accuracy(report), *_latency(report)]
    reasons += [record.summary for record in report.passes if record.name == STEP_NAME]
    if "synthetic" in report.calibration and report.weights.trained:
        reasons.append("calibrated on synthetic images: give --calib DIR")
    return report.model_copy(
        update={
            "gates": results,
            "verdict": verdict,
            "verdict_reasons": reasons,
            "exit_code": int(code),
        }
    )


def _accuracy(report: Report) -> str:
    found = report.find_accuracy("compressed")
    assert found is not None  # every run has that file, and rates all or none
    return (
        f"top-1 {found.top1_original:.2f} % became {found.top1:.2f} % in the file that ships "
        f"({found.images} images)"
    )


def _fidelity(report: Report) -> list[str]:
    found = [row for row in report.fidelity if row.artifact == "compressed"]
    return [f"{row.level}: {row.sqnr_db:.1f} dB beside the original's ({row.format}, "
            f"{row.images} images)" for row in found]  # fmt: skip


def _latency(report: Report) -> list[str]:
    lines = []
    for m in report.measurements:
        if m.artifact != "compressed" or m.ratio is None:
            continue
        if m.noisy:
            lines.append(f"latency on {m.target} is too noisy to use")
        elif m.ratio_low is not None and m.ratio_low > 1:
            lines.append(f"slower than the original on {m.target} ({m.ratio:.2f} of its time)")
        else:
            lines.append(f"takes {m.ratio:.2f} of the original's time on {m.target}")
    return lines
