"""The report in a terminal: a verdict, one table, where the files are."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit.report import view, wording
from deploykit.report.model import Report

__all__ = ["plain", "render_terminal", "say"]

_COLOURS = {"good": "green", "bad": "red", "doubt": "yellow", "plain": ""}
_ASCII = str.maketrans({
    "−": "-", "–": "-", "…": "..", "×": "x", "→": "->", "·": "|", "★": "*", "✔": "ok", "✘": "X",
})  # fmt: skip


def render_terminal(report: Report, console: Console, out_dir: Path | str | None = None) -> None:
    """Print what a person wants to know first; the rest is in the report's files.

    Good at 80 columns. Without a terminal behind it, the console writes no colour.
    """
    # Text, never markup: names come from files we did not write.
    mood = view.mood(report)
    sign = {"good": "✔", "bad": "✘"}.get(mood, "!")
    say(console, f"{sign} {view.verdict(report)}: {report.model} {report.bits}",
          f"bold {_COLOURS[mood]}")  # fmt: skip
    for reason in report.verdict_reasons:
        say(console, f"  {reason}")
    if not report.weights.trained:
        say(console, f"  accuracy {wording.REFUSED} ({report.weights.source})", "red")
    console.print(_table(report, console))
    if report.weights.trained and (accuracy := report.find_accuracy("compressed")):
        say(console, f"Top-1: {wording.drop_sentence(accuracy)}")
    for row in report.fidelity:
        if row.artifact == "compressed":
            error = f"SQNR {wording.sqnr(row.sqnr_db)}, relative error {row.relative_error:.2g}"
            say(console, f"{row.level} ({row.format}): {error}, on {row.images} images")
    say(console, *_parity(report))
    for gate in report.gates:
        if not gate.passed:
            say(console, f"Gate {gate.name} failed: {gate.reason}", "red")
    for warning in report.warnings:
        say(console, f"Warning: {warning}", "yellow")
    for artifact in report.artifacts:
        made_by = f" ({artifact.algorithm})" if artifact.algorithm else ""
        say(console, f"{artifact.name}{made_by}: {artifact.path}")
        if artifact.name != "original":
            for note in artifact.notes:
                say(console, f"  {note}")
    if out_dir is not None:
        say(console, f"report: {Path(out_dir) / 'report.html'}")


def _table(report: Report, console: Console) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    rows = view.rows(report)
    targets = list(dict.fromkeys(row.target for row in rows))
    for name in ("artefact", "top-1", "size", "p50 ms", "original", "peak"):
        justify = "left" if name in ("artefact", "original") else "right"
        heading = "vs original" if name == "original" else name
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for target in targets:
        if target:
            table.add_row(Text(plain(target, console), style="dim"))
        for row in (row for row in rows if row.target == target):
            # The line above the table says why; the long word would break the columns.
            top1 = "refused" if row.top1 == wording.REFUSED else row.top1
            cells = (f"{row.artifact} {row.precision}", top1, row.size, row.p50, row.ratio)
            style = "bold" if row.artifact == "compressed" else ""
            table.add_row(*(Text(plain(c, console), style=style) for c in (*cells, row.peak)))
    return table


def _parity(report: Report) -> tuple[str, str]:
    if not report.own_parity:
        return "Parity: not checked", "yellow"
    rows = report.own_parity
    missed = [row for row in rows if not row.passed]
    agree = min(
        (row.top1_agreement for row in rows if row.top1_agreement is not None), default=None
    )
    count = len(rows)
    text = f"Parity: {count - len(missed)} of {count} within tolerance"
    if agree is not None:
        text += f", top-1 agreement {wording.percent(agree)} or better"
    return (text, "red") if missed else (text, "")


def say(console: Console, text: str, style: str = "") -> None:
    """One line of plain text, as this console can show it."""
    console.print(Text(plain(text, console), style=style), soft_wrap=True)


def plain(text: str, console: Console) -> str:
    """The text as this console's encoding can show it."""
    text = wording.clean(text)
    if console.encoding.lower().startswith("utf"):
        return text
    encoding = console.encoding
    return text.translate(_ASCII).encode(encoding, errors="replace").decode(encoding)
