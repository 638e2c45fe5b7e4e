"""The judgement of ``deploykit check`` as Markdown, for a job's page or a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from deploykit.report.gates import failed_gates
from deploykit.report.markdown import markdown_template
from deploykit.report.model import Report
from deploykit.types import GateResult

__all__ = ["gates_markdown"]


def gates_markdown(report: Report, gates: Sequence[GateResult]) -> str:
    """A verdict and a table with a row a gate; every text from the report is escaped."""
    return markdown_template("gates.md.j2").render(
        report=report, gates=gates, failed=failed_gates(gates)
    )
