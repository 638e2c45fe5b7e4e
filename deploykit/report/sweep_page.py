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
    "ratio": "time / original",
    "latency_ms": "p50, ms",
    "bytes": "size",
}
_WORDS = {
    "top1": "top-1", "ratio": "time", "latency_ms": "latency", "bytes": "size",
    "knee": "compromise",
}  # fmt: skip
"""What objectives, and the best in all of them, are called in sentences."""


def headings(report: SweepReport) -> list[str]:
    """Of the table's columns. What was tried goes by the last part of its name where that tells."""
    figures = ["top-1", "change, points (95 %)", "time / original (95 %)", "p50, ms", "size"]
    short = [name.rpartition(".")[2] for name in report.dimensions]
    tried = [s if short.count(s) == 1 else n for n, s in zip(report.dimensions, short, strict=True)]
    return ["trial", *figures, *tried, ""]


def table_rows(report: SweepReport, trials: Sequence[TrialResult]) -> list[list[str]]:
    """One text for each of ``headings``, a row a trial."""
    return [
        [
            str(trial.number),
            wording.percent(trial.top1),
            _change(trial),
            _ratio(trial),
            wording.ms(trial.latency_ms),
            wording.bytes_text(trial.bytes),
            *(_value(trial.values.get(key)) for key in report.dimensions),
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
        best=[(name, *_best(report, report.trial(n))) for name, n in _by_trial(report).items()],
        objectives=_listed(report.objectives),
        slower=bool(front) and all((trial.ratio or 0) > 1 for trial in front),
        pictures=[(Markup(p.svg), p.caption) for p in pictures],  # noqa: S704  drawn here
        words=wording,
    )


def print_sweep(report: SweepReport, console: Console) -> None:
    """The trials that no other beats, and how many there were."""
    failed = [t for t in report.trials if t.state == "failed"]
    console.print(
        f"{len(report.trials)} trials, {len(failed)} failed; no other beats these "
        f"{len(report.front)} in {_listed(report.objectives)} together:",
        markup=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading in headings(report):
        whole = heading in ("trial", "top-1", "p50, ms", "size")  # else they break within words
        table.add_column(wording.clean(heading), overflow="fold", no_wrap=whole)
    for row in table_rows(report, [report.trial(number) for number in report.front]):
        table.add_row(*(Text(wording.clean(cell)) for cell in row))
    console.print(table)
    for trial in failed[:5]:
        console.print(Text(f"trial {trial.number} failed: {wording.clean(trial.reason)}", "yellow"))
    for warning in report.warnings:
        console.print(Text(f"Warning: {wording.clean(warning)}", style="yellow"))


def _value(value: object) -> str:
    return wording.shorten(wording.clean("–" if value is None else value), 40)


def _listed(names: Sequence[str]) -> str:
    """``top-1, time and size``."""
    words = [_WORDS[name] for name in names]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _by_trial(report: SweepReport) -> dict[str, int]:
    """``best top-1 and size`` and the trial that is, the compromise first."""
    names: dict[int, list[str]] = {}
    for name in ("knee", *(name for name in report.best if name != "knee")):
        if name in report.best:
            names.setdefault(report.best[name], []).append(name)
    return {_best_in(report, found): number for number, found in names.items()}


def _best_in(report: SweepReport, names: Sequence[str]) -> str:
    """``best time and size``; of the best in each objective nothing more need be said."""
    if set(report.objectives) <= set(names):
        return "best in all of them"
    return f"best {_listed(names)}"


def _best(report: SweepReport, trial: TrialResult) -> tuple[TrialResult, str, str]:
    """A trial, what it gives and takes, and the name that its recipe is kept under."""
    facts = [
        "" if trial.top1 is None else wording.percent(trial.top1),
        _speed(trial),
        "" if trial.latency_ms is None else f"{wording.ms(trial.latency_ms)} ms",
        "" if trial.bytes is None else wording.bytes_text(trial.bytes),
    ]
    name = next(name for name, number in report.best.items() if number == trial.number)
    return trial, ", ".join(fact for fact in facts if fact), name


def _speed(trial: TrialResult) -> str:
    """``1.66× faster`` than the original, on the target where it does worst."""
    ratio = trial.ratio
    if ratio is None or ratio <= 0:
        return ""
    if trial.noisy:
        return f"time {wording.TOO_NOISY}"
    return f"{1 / ratio:.2f}× faster" if ratio < 1 else f"{ratio:.2f}× slower than the original"


def _change(trial: TrialResult) -> str:
    """Of the original's top-1; a minus is a loss."""
    if trial.drop is None or trial.drop_low is None or trial.drop_high is None:
        return "–"
    low, high = wording.change(-trial.drop_high), wording.change(-trial.drop_low)
    return f"{wording.change(-trial.drop)} ({low} … {high})"


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
    if best:
        return _best_in(report, best)
    return "beaten by none" if trial.number in report.front else ""


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

    def scaled(name: Objective) -> tuple[NDArray[np.float64], str]:
        values = np.array([t.objective(name) for t in shown], float)
        if name != "bytes":
            return values, _NAMES[name]
        factor, unit = (1e6, "MB") if values.max() >= 1e6 else (1e3, "kB")
        return values / factor, f"{_NAMES[name]}, {unit}"

    def paint(axes: Axes) -> None:
        (x, below), (y, beside) = scaled(across), scaled(up)
        front = np.array([t.number in report.front for t in shown])
        if not front.all():
            axes.scatter(x[~front], y[~front], s=22, color=BEFORE, label="beaten by another")
        axes.scatter(x[front], y[front], s=44, color=AFTER, label="beaten by none")
        for t, left, high in zip(shown, x, y, strict=True):
            if t.number in report.best.values():
                axes.annotate(str(t.number), (left, high), color=INK, xytext=(5, 4),
                              textcoords="offset points")  # fmt: skip
        axes.set_xlabel(below)
        axes.set_ylabel(beside)
        axes.grid()
        axes.margins(0.08)
        if up == "top1":
            axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.15), ncols=2, borderaxespad=0)

    caption = (
        f"Each dot is a trial, by {_WORDS[across]} and {_WORDS[up]}. Whether another beats it "
        f"counts {_listed(report.objectives)} together; the best are numbered"
    )
    return draw(f"sweep-{across}-{up}", caption, 3.2, paint)
