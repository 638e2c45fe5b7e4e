"""The split report for people: one HTML page, and a table in the terminal."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit.report import wording
from deploykit.report.html import page_template
from deploykit.report.plots import AFTER, BEFORE, Plot, draw
from deploykit.report.split_model import SplitReport

__all__ = ["print_split", "render_page", "table_rows"]

HEADINGS = ("file", "classes", "top-1", "size", "p50, ms", "of the original's time")


def table_rows(report: SplitReport) -> list[tuple[str, ...]]:
    """Original, parts and ensemble, one text for each of ``HEADINGS``."""
    accuracy = report.accuracy
    first = report.original_measurement
    every = sum(len(part.classes) for part in report.parts)
    before = wording.percent(accuracy.top1_original) if accuracy else "–"
    rows: list[tuple[str, ...]] = [(
        "original", str(every), before, wording.bytes_text(report.original.bytes),
        wording.ms(first.p50_ms if first else None), "1.00" if first else "–",
    )]  # fmt: skip
    for part in report.parts:
        m = part.measurement
        rows.append((
            part.name,
            str(len(part.classes)),
            f"{wording.percent(part.accuracy.top1)} of its classes" if part.accuracy else "–",
            wording.bytes_text(part.artifact.bytes),
            wording.ms(m.p50_ms if m else None),
            _ratio(m.ratio if m else None),
        ))  # fmt: skip
    after = wording.percent(accuracy.top1) if accuracy else "–"
    size = f"{wording.bytes_text(report.bytes)}, at most {wording.bytes_text(report.largest_bytes)}"
    times = f"{_ratio(report.parallel_ratio)} side by side, {_ratio(report.serial_ratio)} in turns"
    rows.append(("ensemble", str(every), after, size, "–", times))
    return rows


def render_page(report: SplitReport) -> str:
    """One self-contained page; every text in it is escaped."""
    picture = _plot(report)
    return page_template("split.html.j2").render(
        report=report,
        headings=HEADINGS,
        rows=table_rows(report),
        picture=(Markup(picture.svg), picture.caption),  # noqa: S704  drawn here
        words=wording,
    )


def print_split(report: SplitReport, console: Console, out: Path) -> None:
    """The table, the ensemble's drop, where the files are."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in table_rows(report):
        table.add_row(*(Text(wording.clean(cell)) for cell in row))
    console.print(f"{report.model} in {len(report.parts)} parts, {report.bits}", markup=False)
    console.print(table)
    if report.accuracy is not None:
        console.print(f"Top-1: {wording.drop_sentence(report.accuracy)}", markup=False)
    for warning in report.warnings:
        console.print(Text(f"Warning: {wording.clean(warning)}", style="yellow"))
    console.print(f"report: {out / 'split.html'}", markup=False, soft_wrap=True)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _plot(report: SplitReport) -> Plot:
    names = ["original", *(part.name for part in report.parts)]
    sizes = [report.original.bytes, *(part.artifact.bytes for part in report.parts)]

    def paint(axes: Axes) -> None:
        colours = [BEFORE] + [AFTER] * len(report.parts)
        bars = axes.barh(range(len(names)), [s / 1e6 for s in sizes], color=colours, height=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.bar_label(bars, [wording.bytes_text(s) for s in sizes], padding=4)
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.set_xlabel("MB on disk: what each device holds")

    return draw("split", "Size of every device's file", 0.7 + 0.4 * len(names), paint)
