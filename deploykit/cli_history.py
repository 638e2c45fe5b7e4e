"""The ``history`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploykit.cli_options import Json
from deploykit.json_output import print_json

__all__ = ["history"]


def history(
    file: Annotated[Path, typer.Argument(help="What check --history wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Trends: a .html or .svg file.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show how accuracy, latency and size went from run to run."""
    import json

    from deploykit.errors import UsageError
    from deploykit.fsio import atomic_write_text
    from deploykit.history import read_history
    from deploykit.report.history_page import print_history, render_history, render_svg

    if out is not None and out.suffix not in (".html", ".svg"):
        raise UsageError(f"-o {out}: wanted a name that ends in .html or .svg")
    entries, warnings = read_history(file)
    if out is not None:
        page = render_history(entries, warnings) if out.suffix == ".html" else render_svg(entries)
        atomic_write_text(out, page)
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for warning in warnings:
        errors.print(f"warning: {warning}", markup=False)
    print_history(entries, Console(stderr=as_json, highlight=False))
    if as_json:
        print_json(json.dumps([entry.model_dump(mode="json") for entry in entries]))
    return 0
