"""A bench report for people and for spreadsheets."""

from __future__ import annotations

import csv
import io
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit.bench import BenchReport, BenchRow, load_bench
from deploykit.errors import UsageError
from deploykit.json_output import print_json
from deploykit.report import wording

__all__ = ["bench_csv", "print_bench", "show_bench"]

_COLUMNS = ("file", "p50 ms", "vs reference", "images/s", "p90 ms", "peak", "load ms")
_LEFT = ("file", "vs reference")


def print_bench(report: BenchReport, console: Console) -> None:
    """The table, what couldn't be measured, and what the machine was."""
    for heading, rows in groupby(report.rows, _heading):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
        for column in _COLUMNS:
            justify: Any = "left" if column in _LEFT else "right"
            table.add_column(column, justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(Text(wording.clean(cell)) for cell in _cells(row)))
        _line(console, heading, "bold")
        console.print(table)
    seen: dict[object, str] = {}
    for row in report.rows:
        m = row.measurement
        seen[m.target] = f"{m.target}: {m.device.runtime}; {m.device.device}"
        kernels = ", ".join(f"{count} {name}" for name, count in sorted(m.kernels.items()))
        seen[m.target, m.artifact] = f"  {m.artifact} ran as {m.ran_as} ({kernels or 'no kernels'})"
    for line in seen.values():
        _line(console, line)
    _line(console, f"input {'x'.join(map(str, report.input_shape))}, random; images/s is batch/p50")
    for row in report.rows:
        m = row.measurement
        if m.noisy:
            why = m.withheld or "its interval is wider than 5 %"
            _line(console, f"noisy: {m.artifact} on {m.target}, batch {m.batch}: {why}", "yellow")
    for gap in report.gaps:
        where = f"{gap.target}, {gap.threads} threads, batch {gap.batch}"
        _line(console, f"not measured: {where}: {gap.reason}", "red")


def bench_csv(report: BenchReport) -> str:
    """One line a row; times in milliseconds, sizes in bytes. A blank is a figure not had."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "file", "bytes", "precision", "target", "runtime", "device", "threads", "batch",
            "samples", "p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms", "images_per_s",
            "reference", "ratio", "ratio_low", "ratio_high", "noisy", "peak_rss_bytes",
            "device_memory_bytes", "load_ms", "first_call_ms", "energy_mj", "ran_as", "kernels",
        ]
    )  # fmt: skip
    sizes = {file.name: file.bytes for file in report.files}
    for row in report.rows:
        m = row.measurement
        kernels = ", ".join(f"{count} {name}" for name, count in sorted(m.kernels.items()))
        writer.writerow(
            [
                m.artifact, sizes[m.artifact], m.precision, m.target, m.device.runtime,
                m.device.device, m.device.threads, m.batch, m.samples, m.p50_ms, m.p50_low_ms,
                m.p50_high_ms, m.p90_ms, m.p99_ms, row.images_per_s, row.reference, m.ratio,
                m.ratio_low, m.ratio_high, m.noisy, m.peak_rss_bytes, m.device_memory_bytes,
                m.load_ms, m.first_call_ms, m.energy_mj, m.ran_as, kernels,
            ]
        )  # fmt: skip
    return text.getvalue()


def show_bench(path: Path, *, as_json: bool, pages: bool) -> bool:
    """Show a bench report again; False if the file is none.

    Args:
        as_json: on standard output, as one line.
        pages: Markdown or HTML was asked for, which it doesn't have.

    Raises:
        UsageError: it is a broken one, or ``pages``.
    """
    report = load_bench(path)
    if report is None:
        return False
    if pages:
        message = f"{path} is a bench report, which has no pages; leave -o and --markdown out"
        raise UsageError(message)
    if as_json:
        print_json(report.to_json())
    else:
        print_bench(report, Console(highlight=False))
    return True


def _heading(row: BenchRow) -> str:
    m = row.measurement
    threads = m.device.threads
    return f"{m.target}, {threads} thread{'s' if threads > 1 else ''}, batch {m.batch}"


def _cells(row: BenchRow) -> tuple[str, ...]:
    m = row.measurement
    return (
        m.artifact,
        wording.ms(m.p50_ms) + (" noisy" if m.noisy else ""),
        "reference" if m.artifact == row.reference else wording.ratio_short(m),
        f"{row.images_per_s:.4g}",
        wording.ms(m.p90_ms),
        "–" if m.peak_rss_bytes is None else wording.bytes_text(m.peak_rss_bytes),
        wording.ms(m.load_ms),
    )


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(wording.clean(text), style=style), soft_wrap=True)
