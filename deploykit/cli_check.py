"""The ``check`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploykit.cli_options import Json, listed
from deploykit.json_output import print_json

__all__ = ["check"]


def check(
    report: Annotated[Path, typer.Argument(help="report.json, or its folder.")],
    limits: Annotated[Path | None, typer.Option(help="File of limits (YAML).")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Points of top-1 that may go.")] = None,
    max_latency: Annotated[float | None, typer.Option(help="Limit of p50 in ms.")] = None,
    max_latency_ratio: Annotated[
        float | None,
        typer.Option(
            "--max-latency-ratio", "--max-ratio", help="Limit of the time against the original's."
        ),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Limit of the file's size.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="An earlier report to be no worse than.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            "--target",
            help="Targets the latency limits mean, comma separated, or all.",
            show_default="the first",
        ),
    ] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML here.")] = None,
    history: Annotated[Path | None, typer.Option(help="Add a line to this file.")] = None,
    markdown: Annotated[bool, typer.Option(help="Print Markdown, for a job's page.")] = False,
    as_json: Json = False,
) -> int:
    """Judge a report against limits or an earlier report; the exit code is the answer."""
    from deploykit.report.gates import TargetLimits, evaluate_gates, raise_for_gates
    from deploykit.report.gates_markdown import gates_markdown
    from deploykit.report.limits import LimitsFile, load_limits
    from deploykit.report.model import load_report
    from deploykit.tables import gates_table

    held = (load_limits(limits) if limits is not None else LimitsFile()).with_options(
        max_drop=max_drop,
        max_latency_ms=max_latency,
        max_latency_ratio=max_latency_ratio,
        max_bytes=max_bytes,
        baseline=baseline,
    )
    found = load_report(report)
    own = held.target_limits
    judged = {name: own.get(name, TargetLimits()) for name in listed(targets) or own}
    if "all" in judged:
        names = dict.fromkeys(m.target for m in found.measurements if m.artifact == "compressed")
        judged = {name: own.get(name, TargetLimits()) for name in names}
    gates = evaluate_gates(
        found,
        max_drop=held.max_drop,
        max_latency_ms=held.max_latency_ms,
        max_bytes=held.max_bytes,
        min_sqnr_db=held.min_sqnr_db,
        max_latency_ratio=held.max_latency_ratio,
        baseline=None if held.baseline is None else load_report(held.baseline),
        targets=judged or None,
    )
    if junit is not None:
        from deploykit.report.junit import write_junit

        write_junit(found, gates, junit)
    if history is not None:
        from deploykit.history import append_history, history_entry

        append_history(history, history_entry(found, gates))
    Console(stderr=as_json or markdown, highlight=False).print(gates_table(gates))
    if markdown:
        sys.stdout.write(gates_markdown(found, gates))
    if as_json:
        print_json(json.dumps([gate.model_dump(mode="json") for gate in gates]))
    raise_for_gates(gates)
    return 0
