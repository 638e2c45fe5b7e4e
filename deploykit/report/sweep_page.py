"""The sweep's report for people: one HTML page, and a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit.report import wording
from deploykit.report.html import page_template
from deploykit.report.plots import AFTER, BEFORE, INK, Plot, draw
from deploykit.sweep.result import SweepReport, TrialResult
from deploykit.sweep.spec import Objective

__all__ = ["headings", "print_sweep", "render_page", "table_rows"]

_NAMES: dict[Objective, str] = {
    "top1": "top-1, %",
    "ratio": "of the original's time",
    "latency_ms": "p50, ms",
    "bytes": "MB on disk",
}


def headings(report: SweepReport) -> list[str]:
    """Of the table's columns."""
    figures = ["top-1", "lost, points (95 %)", "time / original (95 %)", "p50, ms", "size"]
    return ["trial", *report.dimensions, *figures, ""]


def table_rows(report: SweepReport, trials: Sequence[TrialResult]) -> list[list[str]]:
    """One text for each of ``headings``, a row a trial."""
    return [
        [
            str(trial.number),
            *(_value(trial.values.get(key)) for key in report.dimensions),
            wording.percent(trial.top1),
            _drop(trial),
            _ratio(trial),
            wording.ms(trial.latency_ms),
            wording.bytes_text(trial.bytes),
            _remark(report, trial),
        ]
        for trial in trials
    ]


def render_page(report: SweepReport) -> str:
    """One self-contained page; every text in it is escaped."""
    done = [t for t in report.trials if t.state == "complete"]
    pictures = [picture for pair in _pairs(report) if (picture := _scatter(report, *pair))]
    front = [report.trial(number) for number in report.front]
    return page_template("sweep.html.j2").render(
        report=report,
        headings=headings(report),
        front=table_rows(report, front),
        rows=table_rows(report, report.trials),
        counts=(len(done), len(report.trials) - len(done)),
        best=[(name, number, report.trial(number)) for name, number in report.best.items()],
        pictures=[(Markup(p.svg), p.caption) for p in pictures],  # noqa: S704  drawn here
        words=wording,
    )


def print_sweep(report: SweepReport, console: Console) -> None:
    """The trials that no other beats, and how many there were."""
    failed = [t for t in report.trials if t.state == "failed"]
    console.print(
        f"{len(report.trials)} trials, {len(failed)} failed; no other beats these "
        f"{len(report.front)} in {', '.join(report.objectives)}:",
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading in headings(report):
        table.add_column(wording.clean(heading), overflow="fold")
    for row in table_rows(report, [report.trial(number) for number in report.front]):
        table.add_row(*(Text(wording.clean(cell)) for cell in row))
    console.print(table)
    for trial in failed[:5]:
        console.print(Text(f"trial {trial.number} failed: {wording.clean(trial.reason)}", "yellow"))
    for warning in report.warnings:
        console.print(Text(f"Warning: {wording.clean(warning)}", style="yellow"))


def _value(value: object) -> str:
    return wording.shorten(wording.clean("–" if value is None else value), 40)


def _drop(trial: TrialResult) -> str:
    if trial.drop is None or trial.drop_low is None or trial.drop_high is None:
        return "–"
    return f"{trial.drop:.2f} ({trial.drop_low:.2f} … {trial.drop_high:.2f})"


def _ratio(trial: TrialResult) -> str:
    """Of the target where it does worst."""
    worst = max(
        (t for t in trial.times if t.ratio is not None), key=lambda t: t.ratio or 0, default=None
    )
    if worst is None or worst.ratio is None:
        return "–"
    text = f"{worst.ratio:.3f}"
    if worst.ratio_low is not None and worst.ratio_high is not None:
        text += f" ({worst.ratio_low:.3f} … {worst.ratio_high:.3f})"
    text += f" on {worst.target}" if len(trial.times) > 1 else ""
    return text + (" noisy" if worst.noisy else "")


def _remark(report: SweepReport, trial: TrialResult) -> str:
    if trial.state == "failed":
        return f"failed: {wording.clean(trial.reason)}"
    if beyond := trial.beyond(report.limits):
        return f"beyond a limit: {beyond}"
    if trial.same_as is not None:
        return f"as trial {trial.same_as}"
    best = [name for name, number in report.best.items() if number == trial.number]
    words = ["knee" if name == "knee" else f"best {name}" for name in best]
    return ", ".join(words) if words else ("front" if trial.number in report.front else "")


def _pairs(report: SweepReport) -> list[tuple[Objective, Objective]]:
    """Pictures worth drawing: horizontally what costs, vertically what is won for it."""
    costs: list[Objective] = [name for name in report.objectives if name != "top1"]
    if "top1" in report.objectives:
        return [(cost, "top1") for cost in costs]
    return [(costs[0], other) for other in costs[1:]]


def _scatter(report: SweepReport, across: Objective, up: Objective) -> Plot | None:
    shown = [
        t
        for t in report.trials
        if t.state == "complete"
        and t.same_as is None
        and t.objective(across) is not None
        and t.objective(up) is not None
    ]
    if not shown:
        return None

    def scaled(name: Objective) -> NDArray[np.float64]:
        unit = 1e6 if name == "bytes" else 1.0
        return np.array([t.objective(name) for t in shown], float) / unit

    def paint(axes: Axes) -> None:
        x, y = scaled(across), scaled(up)
        front = np.array([t.number in report.front for t in shown])
        axes.scatter(x[~front], y[~front], s=22, color=BEFORE, label="beaten by another")
        axes.scatter(x[front], y[front], s=44, color=AFTER, label="beaten by none")
        for t, left, high in zip(shown, x, y, strict=True):
            if t.number in report.best.values():
                axes.annotate(str(t.number), (left, high), color=INK, xytext=(5, 4),
                              textcoords="offset points")  # fmt: skip
        axes.set_xlabel(_NAMES[across])
        axes.set_ylabel(_NAMES[up])
        axes.grid()
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.15), ncols=2, borderaxespad=0)

    caption = (
        f"Every trial, {_NAMES[across]} against {_NAMES[up]}; the Pareto front is that of "
        f"{', '.join(report.objectives)} together, numbers are the best trials'"
    )
    return draw(f"sweep-{across}-{up}", caption, 3.2, paint)
