"""A history for people: trends as one HTML page or one SVG, and a table in the terminal."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from html import escape

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit.history import HistoryEntry, HistoryTime
from deploykit.report import wording
from deploykit.report.html import page_template
from deploykit.report.plots import AFTER, BAD, BEFORE, INK, Plot, draw

__all__ = ["print_history", "render_history", "render_svg"]

_MOST_ROWS = 30
_LABELS = 12


def print_history(entries: Sequence[HistoryEntry], console: Console) -> None:
    """The last runs, one a row."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    for heading in _headings(entries):
        whole = heading in ("top-1", "size", "commit")  # else they break within a word
        least = {"run": len("2026-11-22"), "gates": len("max_latency_ratio")}.get(heading)
        table.add_column(heading, overflow="fold", no_wrap=whole, min_width=least)
    for row in _rows(entries)[-_MOST_ROWS:]:
        table.add_row(*(Text(wording.clean(cell)) for cell in row))
    if len(entries) > _MOST_ROWS:
        console.print(f"the last {_MOST_ROWS} of {len(entries)} runs")
    console.print(table)
    for text in _changes(entries):
        console.print(Text(wording.clean(text), style="yellow"))


def render_history(entries: Sequence[HistoryEntry], warnings: Sequence[str]) -> str:
    """One self-contained page; every text in it is escaped."""
    return page_template("history.html.j2").render(
        entries=entries,
        models=_models(entries),
        headings=_headings(entries),
        rows=_rows(entries)[::-1],
        pictures=[(Markup(p.svg), p.caption) for p in _plots(entries)],  # noqa: S704  drawn here
        remarks=[*_changes(entries), *warnings],
    )


def render_svg(entries: Sequence[HistoryEntry]) -> str:
    """The trends below each other as one SVG file, with colours of its own, light and dark."""
    css = page_template("report.css.j2").render()
    colours = "".join(re.findall(r":root\s*\{[^}]*\}", css)[:1])
    dark = re.search(r"@media \(prefers-color-scheme: dark\)\s*\{\s*:root\s*\{[^}]*\}\s*\}", css)
    pictures = [plot.svg for plot in _plots(entries)]
    sizes = [_size(svg) for svg in pictures]
    width, height = max(w for w, _ in sizes), sum(h for _, h in sizes)
    inner, top = "", 0.0
    for svg, (_, tall) in zip(pictures, sizes, strict=True):
        inner += svg.replace("<svg ", f'<svg y="{top:g}" ', 1)
        top += tall
    title = escape(f"{len(entries)} runs of {', '.join(dict.fromkeys(e.model for e in entries))}")
    style = f"{colours}{dark[0] if dark else ''} svg {{ background: var(--paper) }}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width:g}pt" height="{height:g}pt" viewBox="0 0 {width:g} {height:g}">'
        f"<title>{title}</title><style>{style}</style>{inner}</svg>\n"
    )


def _size(svg: str) -> tuple[float, float]:
    """Width and height in the picture's own units."""
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None  # Matplotlib writes one
    return float(found[1]), float(found[2])


def _plots(entries: Sequence[HistoryEntry]) -> list[Plot]:
    plots = []
    if any(e.top1 is not None for e in entries):
        plots.append(_top1_plot(entries))
    targets = dict.fromkeys(t.target for e in entries for t in e.times if t.ratio is not None)
    plots += [_ratio_plot(entries, target, number) for number, target in enumerate(targets)]
    if any(e.bytes is not None for e in entries):
        plots.append(_bytes_plot(entries))
    return plots


def _top1_plot(entries: Sequence[HistoryEntry]) -> Plot:
    def paint(axes: Axes) -> None:
        _line(axes, entries, [e.top1 for e in entries], _what_is_rated)
        limits = [
            (n, e.accuracy.top1_original - gate.limit)
            for n, e in enumerate(entries, 1)
            for gate in e.gates
            if gate.name == "max_drop" and e.accuracy is not None
        ]
        _limit(axes, limits)
        axes.set_ylabel("top-1, %")
        _runs(axes, entries)

    caption = (
        "Top-1 of the compressed file; a line joins runs of one model on the same images; "
        "dashed: the least that the gate allows"
    )
    return draw("top1", caption, 2.2, paint)


def _ratio_plot(entries: Sequence[HistoryEntry], target: str, number: int) -> Plot:
    def paint(axes: Axes) -> None:
        found = [(n, t) for n, e in enumerate(entries, 1) if (t := _time(e, target))]
        for noisy, colour in ((False, AFTER), (True, BEFORE)):
            some = [(n, t) for n, t in found if t.noisy is noisy and t.ratio is not None]
            if not some:
                continue
            ratios = [t.ratio or 0.0 for _, t in some]
            low = [max(0.0, r - (t.ratio_low or r)) for r, (_, t) in zip(ratios, some, strict=True)]
            high = [
                max(0.0, (t.ratio_high or r) - r) for r, (_, t) in zip(ratios, some, strict=True)
            ]
            axes.errorbar(
                [n for n, _ in some], ratios, yerr=[low, high], fmt="o", color=colour, capsize=3,
                markersize=4, label="noisy" if noisy else None,
            )  # fmt: skip
        names = ("max_latency_ratio", f"max_latency_ratio[{target}]")
        _limit(
            axes,
            [(n, g.limit) for n, e in enumerate(entries, 1) for g in e.gates if g.name in names],
        )
        for (_, before), (n, now) in itertools.pairwise(found):
            if before.machine != now.machine:
                axes.axvline(n - 0.5, color=INK, linewidth=1, linestyle=":")
        axes.set_ylabel("of the original's time")
        _runs(axes, entries)

    caption = (
        f"Time of the compressed file on {wording.clean(target)} against the original's, with 95 % "
        "intervals; grey: noisy; dashed: the limit; dotted: another machine from here on"
    )
    return draw(f"ratio{number}", caption, 2.2, paint)


def _bytes_plot(entries: Sequence[HistoryEntry]) -> Plot:
    def paint(axes: Axes) -> None:
        sizes = [None if e.bytes is None else e.bytes / 1e6 for e in entries]
        _line(axes, entries, sizes, _what_is_made)
        limits = [
            (n, g.limit / 1e6)
            for n, e in enumerate(entries, 1)
            for g in e.gates
            if g.name == "max_bytes"
        ]
        _limit(axes, limits)
        axes.set_ylabel("MB on disk")
        _runs(axes, entries)

    caption = "Size of the compressed file; a line joins runs of one model; dashed: the limit"
    return draw("bytes", caption, 2.2, paint)


def _what_is_made(entry: HistoryEntry) -> str:
    return f"{entry.model} {entry.bits}"


def _what_is_rated(entry: HistoryEntry) -> object:
    """Where this changes, top-1 before and after don't compare."""
    return _what_is_made(entry), entry.accuracy and (entry.accuracy.images, entry.accuracy.data)


def _line(
    axes: Axes,
    entries: Sequence[HistoryEntry],
    values: Sequence[float | None],
    same: Callable[[HistoryEntry], object],
) -> None:
    """A dot a run, joined while what is compared stays the same."""
    pairs = enumerate(zip(entries, values, strict=True), 1)
    known = [(n, entry, value) for n, (entry, value) in pairs if value is not None]
    for _, runs in itertools.groupby(known, key=lambda run: same(run[1])):
        joined = [(n, v) for n, _, v in runs]
        axes.plot(*zip(*joined, strict=True), color=AFTER, marker="o", markersize=4)


def _limit(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    if points:
        runs, limits = zip(*points, strict=True)
        axes.step(runs, limits, where="mid", color=BAD, linestyle="--", linewidth=1.2)
        axes.plot(runs, limits, color=BAD, marker="_", linestyle="none")


def _runs(axes: Axes, entries: Sequence[HistoryEntry]) -> None:
    axes.grid(axis="y")
    axes.set_xlim(0.5, len(entries) + 0.5)
    if len(entries) <= _LABELS:
        axes.set_xticks(range(1, len(entries) + 1), [_short(e) for e in entries], rotation=45)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("run")


def _short(entry: HistoryEntry) -> str:
    return wording.clean(entry.commit[:7] if entry.commit else entry.time[5:16])


def _time(entry: HistoryEntry, target: str) -> HistoryTime | None:
    return next((t for t in entry.times if t.target == target), None)


def _models(entries: Sequence[HistoryEntry]) -> str:
    """The last run's model, and how many others there were."""
    names = list(dict.fromkeys(_what_is_made(entry) for entry in reversed(entries)))
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _only_target(entries: Sequence[HistoryEntry]) -> str | None:
    targets = {time.target for entry in entries for time in entry.times}
    return targets.pop() if len(targets) == 1 else None


def _headings(entries: Sequence[HistoryEntry]) -> tuple[str, ...]:
    """What is most asked first: a narrow window shows no more."""
    only = _only_target(entries)
    times = "time / original" + (f" on {wording.clean(only)}" if only else "") + " (95 %)"
    return ("run", "gates", "top-1", times, "size", "model", "commit")


def _rows(entries: Sequence[HistoryEntry]) -> list[tuple[str, ...]]:
    only = _only_target(entries)
    return [
        (
            f"{number}: {entry.time.replace('T', ' ')[:16]}",
            "missed: " + ", ".join(g.name for g in entry.gates if not g.passed)
            if not all(g.passed for g in entry.gates) else "hold",
            wording.percent(entry.top1),
            "; ".join(_ratio(time, named=only is None) for time in entry.times) or "–",
            wording.bytes_text(entry.bytes), _what_is_made(entry), (entry.commit or "–")[:7],
        )
        for number, entry in enumerate(entries, 1)
    ]  # fmt: skip


def _ratio(time: HistoryTime, *, named: bool) -> str:
    name = f"{time.target}: " if named else ""
    if time.ratio is None:
        return f"{name}–"
    text = f"{name}{time.ratio:.3f}"
    if time.ratio_low is not None and time.ratio_high is not None:
        text += f" ({time.ratio_low:.3f} … {time.ratio_high:.3f})"
    return text + (" noisy" if time.noisy else "")


_CHECKS: tuple[tuple[str, Callable[[HistoryEntry], object]], ...] = (
    ("model", _what_is_made),
    ("recipe", lambda e: e.recipe_sha256[:10]),
    ("images", lambda e: e.accuracy and f"{e.accuracy.images} of {e.accuracy.data}"),
    ("machine", lambda e: sorted({f"{t.target} on {t.machine}" for t in e.times})),
    ("runtime", lambda e: sorted({f"{t.target}: {t.runtime}" for t in e.times})),
)
_NOTES = {
    "model": "another model ({}): nothing before and after compares",
    "recipe": "another recipe ({}): a change may be its doing",
    "images": "other images ({}): top-1 before and after don't compare",
    "machine": "another machine ({}): milliseconds before and after don't compare, ratios do",
    "runtime": "another runtime ({}): ratios may change with it",
}


def _changes(entries: Sequence[HistoryEntry]) -> list[str]:
    """Where neighbours can't be compared as they stand; another model says it all."""
    found = []
    for number, (before, now) in enumerate(itertools.pairwise(entries), 2):
        changed = [(name, of(now)) for name, of in _CHECKS if of(before) != of(now)]
        for name, said in changed[:1] if changed and changed[0][0] == "model" else changed:
            text = ", ".join(said) if isinstance(said, list) else (said or "none")
            found.append(f"run {number}: {_NOTES[name].format(text)}")
    return found
