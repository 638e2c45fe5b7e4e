"""The ``report`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploykit.cli_options import Json
from deploykit.json_output import print_json

__all__ = ["report_"]


def report_(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="report.json files or their folders; several become one matrix."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write all renderings into this folder.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print Markdown, for a pull request.")] = False,
    csv: Annotated[
        Path | None, typer.Option(help="Write a CSV file: a row per file, target and batch.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write gates and parity as JUnit XML, for CI.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print report.json's schema.")] = False,
    as_json: Json = False,
) -> int:
    """Show reports again: in the terminal, as Markdown, JSON, CSV, JUnit XML, or as files."""
    from deploykit.bench_output import show_bench
    from deploykit.errors import UsageError
    from deploykit.fsio import atomic_write_text
    from deploykit.report.junit import junit_text
    from deploykit.report.markdown import render_markdown
    from deploykit.report.model import load_report, schema_text
    from deploykit.report.spreadsheet import csv_text
    from deploykit.report.terminal import render_terminal
    from deploykit.report.write import write_report

    if schema:
        sys.stdout.write(schema_text())
        return 0
    if not sources:
        raise UsageError(
            "wanted a report.json or its folder, got none; see deploykit report --help"
        )
    pages = markdown or any(path is not None for path in (out, csv, junit))
    if len(sources) == 1 and show_bench(sources[0], as_json=as_json, pages=pages):
        return 0
    reports = [(str(source), load_report(source)) for source in sources]
    if csv is not None:
        atomic_write_text(csv, csv_text(reports))
    if junit is not None:
        several = len(reports) > 1
        runs = [(name if several else "", report, report.gates) for name, report in reports]
        atomic_write_text(junit, junit_text(runs))
    console = Console(highlight=False)
    if len(reports) > 1:
        from deploykit.report import matrix_page
        from deploykit.report.matrix import build_matrix

        matrix = build_matrix(reports)
        if out is not None:
            matrix_page.write_matrix(matrix, reports, out)
        if as_json:
            print_json(matrix.to_json())
        elif markdown:
            sys.stdout.write(matrix_page.render_matrix_markdown(matrix))
        else:
            matrix_page.print_matrix(matrix, console, out)
        return 0
    found = reports[0][1]
    if out is not None:
        write_report(found, out)
    if as_json:
        print_json(found.to_json())
    elif markdown:
        sys.stdout.write(render_markdown(found))
    else:
        render_terminal(found, console, out)
    return 0
