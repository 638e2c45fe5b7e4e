"""Gates and parity as JUnit XML, which CI services show beside the tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET  # written here, never parsed

from deploykit.errors import ExitCode
from deploykit.fsio import atomic_write_text
from deploykit.report.model import OWN_ARTIFACTS, Report
from deploykit.report.wording import clean, sqnr
from deploykit.types import GateResult, ParityRow

__all__ = ["junit_text", "write_junit"]


def write_junit(report: Report, gates: Sequence[GateResult] | None, path: Path | str) -> None:
    """Write ``junit_text`` of one report.

    Args:
        gates: what was judged; None takes the run's own.

    Raises:
        UsageError: the file cannot be written.
    """
    judged = report.gates if gates is None else gates
    atomic_write_text(path, junit_text([("", report, judged)]))


def junit_text(runs: Iterable[tuple[str, Report, Sequence[GateResult]]]) -> str:
    """One test case for each gate and for each comparison of a file with its model.

    A limit that was missed is a failure; one that could not be judged (no such figure, too
    noisy) is an error. A peer's file that misses its parity is skipped: the run does not answer
    for it. The gate named ``parity`` sums up the cases after it, and stays.

    Args:
        runs: what to call each (empty where there is only one), its report, what was judged.
    """
    root = ET.Element("testsuites", name="deploykit")
    for source, report, gates in runs:
        name = clean(f"{source}: {report.model}" if source else report.model)
        for kind, cases in (
            ("gates", [_gate_case(name, gate) for gate in gates]),
            ("parity", [_parity_case(name, row) for row in report.parity]),
        ):
            suite = ET.SubElement(root, "testsuite", name=f"{name}: {kind}")
            suite.extend(cases)
            _count(suite, timestamp=clean(report.started))
    _count(root)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _gate_case(model: str, gate: GateResult) -> ET.Element:
    case = ET.Element("testcase", classname=f"{model}.gates", name=clean(gate.name))
    said = clean(gate.reason)
    if gate.passed:
        ET.SubElement(case, "system-out").text = said
    else:
        kind = "error" if gate.value is None else "failure"
        code = ExitCode(gate.exit_code).name.lower()
        ET.SubElement(case, kind, message=said, type=code).text = said
    return case


def _parity_case(model: str, row: ParityRow) -> ET.Element:
    what = " ".join(filter(None, (row.artifact, row.format, row.precision)))
    name = ", ".join(filter(None, (f"{what} on {row.runtime}", f"batch {row.batch}", row.level)))
    case = ET.Element("testcase", classname=f"{model}.parity", name=clean(name))
    agree = row.top1_agreement
    said = clean(
        f"against {row.reference}: SQNR {sqnr(row.sqnr_db)}, max {row.max_abs:.3g}"
        f"{'' if agree is None else f', top-1 agreement {agree:.2f} %'}; wanted {row.tolerance}"
    )
    if row.passed:
        ET.SubElement(case, "system-out").text = said
    elif row.artifact in OWN_ARTIFACTS:
        ET.SubElement(case, "failure", message=said, type="parity").text = said
    else:
        ET.SubElement(case, "skipped", message=f"not this run's own file: {said}")
    return case


def _count(element: ET.Element, **attributes: str) -> None:
    element.set("tests", str(len(element.findall(".//testcase"))))
    for kind in ("failures", "errors", "skipped"):
        tag = {"failures": "failure", "errors": "error"}.get(kind, kind)
        element.set(kind, str(len(element.findall(f".//{tag}"))))
    for name, value in attributes.items():
        element.set(name, value)
