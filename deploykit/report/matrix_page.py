"""The matrix of several reports for people: HTML, Markdown, a table in the terminal, files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit.fsio import atomic_write_text, ensure_directory
from deploykit.report import wording
from deploykit.report.html import markup, page_template
from deploykit.report.markdown import markdown_template
from deploykit.report.matrix import Cell, Column, Matrix
from deploykit.report.model import Report
from deploykit.report.plots import AFTER, BEFORE, FOURTH, INK, THIRD, Plot
from deploykit.report.scatter import MARKS, Dot, Key, scatter_of
from deploykit.report.spreadsheet import csv_text
from deploykit.report.terminal import plain, say
from deploykit.report.wording import shorten

__all__ = ["print_matrix", "render_matrix_html", "render_matrix_markdown", "write_matrix"]

BEST = (
    "nothing in the same column is as accurate, as fast and as small and better in one of them "
    "(times differ where their intervals are apart)"
)

_COLOURS = (AFTER, THIRD, FOURTH, BEFORE, INK)


def render_matrix_html(matrix: Matrix) -> str:
    """One self-contained page; every text in it is escaped."""
    return page_template("matrix.html.j2").render(
        matrix=matrix, best=BEST, pictures=markup([_scatter(matrix)]), column=column_text,
        words=wording, time=time_text, cost=cost_text,
    )  # fmt: skip


def render_matrix_markdown(matrix: Matrix) -> str:
    """One table and the notes, for a pull request."""
    return markdown_template("matrix.md.j2").render(
        matrix=matrix, best=BEST, column=column_text, cell_text=_line
    )


def write_matrix(matrix: Matrix, reports: Sequence[tuple[str, Report]], out: Path) -> None:
    """Write matrix.html, .md, .csv and .json, each whole or not at all, the last one last.

    Raises:
        UsageError: the folder cannot be made or written.
    """
    files = {
        "matrix.html": render_matrix_html(matrix),
        "matrix.md": render_matrix_markdown(matrix),
        "matrix.csv": csv_text(reports),
        "matrix.json": matrix.to_json(),
    }
    folder = ensure_directory(out)
    for name, text in files.items():
        atomic_write_text(folder / name, text)


def print_matrix(matrix: Matrix, console: Console, out: Path | None = None) -> None:
    """The table, what can't be compared, which report is which number."""
    for place, column in enumerate(matrix.columns):
        # One table each: of several devices side by side, nothing would be left in 80 columns.
        say(console, column_text(column), "dim")
        console.print(_table(matrix, place, console))
    say(console, f"★: {BEST}")
    for number, source in enumerate(matrix.sources, 1):
        say(console, f"[{number}] {source.path}: {source.model} {source.bits}, {source.verdict}")
    for note in matrix.notes:
        say(console, f"Note: {note}", "yellow")
    if out is not None:
        say(console, f"matrix: {out / 'matrix.html'}")


def _table(matrix: Matrix, place: int, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading in ("file", "p50 ms", "vs original", "top-1", "change", "size", "report"):
        left = heading in ("file", "vs original", "report")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for index, row in enumerate(matrix.rows):
        for cell in matrix.at(index, place):
            cells = (
                f"{index + 1} {shorten(row.label, 60)}",
                wording.ms(cell.p50_ms),
                cell.beside,
                wording.percent(cell.top1),
                "–" if cell.drop is None else wording.change(-cell.drop),
                wording.bytes_text(cell.bytes),
                f"[{cell.source + 1}]{' ★' if cell.best else ''}",
            )
            style = "bold" if row.artifact == "compressed" else ""
            table.add_row(*(Text(plain(text, console), style=style) for text in cells))
    return table


def column_text(column: Column) -> str:
    """``cpu-openvino on AMD EPYC, batch 1, 2 threads``."""
    if not column.target:
        return "not timed"
    threads = f"{column.threads} thread{'s' if column.threads != 1 else ''}"
    return wording.clean(f"{column.target} on {column.device}, batch {column.batch}, {threads}")


def time_text(cell: Cell) -> str:
    """``4.41 ms``, or that it wasn't timed."""
    return "not timed" if cell.p50_ms is None else f"{wording.ms(cell.p50_ms)} ms"


def cost_text(cell: Cell) -> str:
    """``79.05 % (−0.35), 9.12 MB``."""
    top1 = wording.percent(cell.top1) if cell.top1 is not None else "no accuracy"
    if cell.drop is not None:
        top1 += f" ({wording.change(-cell.drop)})"
    return f"{top1}, {wording.bytes_text(cell.bytes)}"


def _line(cell: Cell) -> str:
    parts = [time_text(cell), cell.beside, cost_text(cell), "★" if cell.best else "–"]
    return ", ".join(part for part in parts if part != "–") + f" [{cell.source + 1}]"


def _scatter(matrix: Matrix) -> Plot | None:
    """Every timed cell, a colour and mark for each column."""
    timed = [index for index, column in enumerate(matrix.columns) if column.target]
    keys = {
        index: Key(_short(matrix.columns[index]), _COLOURS[i % 5], MARKS[i % len(MARKS)])
        for i, index in enumerate(timed)
    }
    dots = []
    for cell in matrix.cells:
        if cell.column not in keys or cell.p50_ms is None or cell.p50_ms <= 0:
            continue
        between = (cell.p50_low_ms or cell.p50_ms, cell.p50_high_ms or cell.p50_ms)
        dots.append(Dot(
            str(cell.row + 1), keys[cell.column], cell.p50_ms, between, cell.top1, _interval(cell),
            cell.bytes / 1e6, cell.noisy,
        ))  # fmt: skip
    return scatter_of("matrix", dots, list(keys.values()), comparable=matrix.comparable,
                      more="; numbers are rows of the table")  # fmt: skip


def _short(column: Column) -> str:
    """The legend has little room: what follows a comma is a detail of the device."""
    return shorten(f"{column.target}, {column.device.split(',')[0]}", 42)


def _interval(cell: Cell) -> tuple[float, float] | None:
    if None in (cell.top1, cell.drop, cell.drop_low, cell.drop_high):
        return None
    assert cell.top1 is not None and cell.drop is not None
    assert cell.drop_low is not None and cell.drop_high is not None
    before = cell.top1 + cell.drop
    return before - cell.drop_high, before - cell.drop_low
