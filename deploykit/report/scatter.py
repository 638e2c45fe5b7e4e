"""Accuracy against latency, the file's size as the mark's area, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from deploykit.report import wording
from deploykit.report.model import Report
from deploykit.report.plots import INK, PAPER, WIDTH, Plot, draw, plain_log_axis, series_style
from deploykit.report.points import Point, front, points

__all__ = ["MARKS", "Dot", "Key", "dot", "scatter_of", "scatter_plot"]

_LARGEST_AREA = 380.0  # square points
_SMALLEST_AREA = 14.0
MARKS = "osD^vP*X"


class Key(NamedTuple):
    """One line of the legend."""

    label: str
    colour: str
    mark: str


@dataclass(frozen=True)
class Dot:
    """One mark: a file on a target.

    Attributes:
        label: written beside it.
        key: its colour and mark, and what the legend calls them.
        ms: median time; ``ms_interval`` its 95 % interval.
        top1: percent, None if unknown; ``top1_interval`` its 95 % interval.
        megabytes: of the file.
        noisy: drawn hollow, and not on the front.
    """

    label: str
    key: Key
    ms: float
    ms_interval: tuple[float, float]
    top1: float | None
    top1_interval: tuple[float, float] | None
    megabytes: float
    noisy: bool


def dot(point: Point, label: str, key: Key) -> Dot | None:
    """A file that was timed, as a mark."""
    m = point.measurement
    if m is None or m.p50_ms <= 0:
        return None
    between = (m.p50_low_ms, m.p50_high_ms)
    megabytes = point.artifact.bytes / 1e6
    return Dot(label, key, m.p50_ms, between, point.top1, point.top1_interval, megabytes, m.noisy)


def scatter_plot(report: Report) -> Plot | None:
    """Every timed file of a run: colour by file, mark by target."""
    timed = [point for point in points(report) if point.measurement]
    colours = series_style([p.artifact.name for p in timed])
    targets = list(dict.fromkeys(p.target for p in timed))
    several = len(targets) > 1
    dots = []
    for point in timed:
        mark = MARKS[targets.index(point.target) % len(MARKS)]
        key = Key(point.target if several else "", colours[point.artifact.name][0], mark)
        dots.append(dot(point, point.label, key))
    return scatter_of("scatter", [d for d in dots if d], [
        Key(target, INK, MARKS[i % len(MARKS)]) for i, target in enumerate(targets) if several
    ])  # fmt: skip


def scatter_of(
    key: str,
    dots: Sequence[Dot],
    legend: Sequence[Key],
    *,
    comparable: bool = True,
    more: str = "",
) -> Plot | None:
    """Draw the marks; without any accuracy, size against latency. None below two marks.

    Args:
        comparable: the accuracies are of the same images; else no front is drawn.
        more: said at the end of the caption.
    """
    rated = [d for d in dots if d.top1 is not None]
    shown = rated or list(dots)
    if len(shown) < 2:
        return None
    if rated:
        caption = "Top-1 against latency: up and left is better; a mark's area is the file's size"
        left_out = len(dots) - len(rated)
        if left_out:
            caption += f"; {left_out} without an accuracy {'is' if left_out == 1 else 'are'} absent"
    else:
        caption = "No accuracy is known, so this is size against latency: down and left is better"
    best = _best(shown, bool(rated)) if comparable or not rated else []
    if len(best) > 1:
        caption += "; the dashed line is the Pareto front"
    elif best:
        caption += "; one file beats or equals all others in both"
    else:
        caption += "; no front is drawn, as the figures can't be compared"
    if any(d.noisy for d in shown):
        caption += "; hollow marks are too noisy to count"
    caption += more
    height = 3.0 + 0.17 * len(legend)
    return draw(key, caption, height, _painter(shown, legend, bool(rated), height, best))


def _painter(
    dots: Sequence[Dot],
    legend: Sequence[Key],
    rated: bool,
    height: float,
    best: Sequence[tuple[float, float]],
) -> Callable[[Axes], None]:
    heights = [_y(d, rated) for d in dots]
    largest = max(d.megabytes for d in dots) or 1.0

    def paint(axes: Axes) -> None:
        low, high = min(d.ms for d in dots), max(d.ms for d in dots)
        plain_log_axis(axes, low, high)
        for d, y in zip(dots, heights, strict=True):
            area = max(_SMALLEST_AREA, _LARGEST_AREA * d.megabytes / largest) if rated else 60.0
            axes.hlines(y, *d.ms_interval, color=d.key.colour, linewidth=1)
            if rated and d.top1_interval is not None:
                axes.vlines(d.ms, *d.top1_interval, color=d.key.colour, linewidth=1, alpha=0.7)
            axes.scatter(
                [d.ms], [y], s=area, marker=d.key.mark, linewidths=1.5, edgecolors=d.key.colour,
                facecolors=PAPER if d.noisy else d.key.colour, alpha=0.75, zorder=3,
            )  # fmt: skip
        if len(best) > 1:
            axes.step(*zip(*best, strict=True), where="post", color=INK, linewidth=1,
                      linestyle="--", alpha=0.6, zorder=2)  # fmt: skip
        axes.set_xlabel(
            "median latency, ms" + (", log scale" if axes.get_xscale() == "log" else "")
        )
        axes.set_ylabel("top-1, %" if rated else "size, MB")
        axes.grid()
        axes.margins(x=0.18, y=0.18)
        if rated:
            axes.set_ylim(top=min(axes.get_ylim()[1], 101))
        else:
            axes.set_ylim(bottom=0)
        _write_labels(axes, dots, heights, height)
        if legend:
            handles = [
                Line2D([], [], linestyle="", color=k.colour, marker=k.mark,
                       label=wording.shorten(wording.clean(k.label), 60))
                for k in legend
            ]  # fmt: skip
            axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2,
                        fontsize=8.5)  # fmt: skip

    return paint


def _y(d: Dot, rated: bool) -> float:
    return d.top1 if rated and d.top1 is not None else d.megabytes


def _best(dots: Sequence[Dot], rated: bool) -> list[tuple[float, float]]:
    """The front from left to right, as it is drawn; equal figures are one corner."""
    sign = -1 if rated else 1  # more accuracy is better, more bytes are not
    costs = [(d.ms, sign * _y(d, rated)) for d in dots if not d.noisy]
    corners = sorted({costs[i] for i in front(costs)})
    return [(ms, sign * cost) for ms, cost in corners]


def _write_labels(axes: Axes, dots: Sequence[Dot], heights: Sequence[float], inches: float) -> None:
    """Names beside the marks, each moved down (or up) until it covers no other."""
    wide, tall = WIDTH * 72 * 0.82, inches * 72 * 0.72  # about what the axes have, in points
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [
        to_axes.transform((d.ms, y)) * (wide, tall) for d, y in zip(dots, heights, strict=True)
    ]
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.6}
    # Left, right, lower and upper edge of what may not be covered: the marks, then the labels.
    taken = [_box(x, y, 7.0, 7.0) for x, y in places]
    for index in sorted(range(len(dots)), key=lambda i: -places[i][1]):
        x, y = map(float, places[index])
        text = wording.shorten(wording.clean(dots[index].label), 30)
        half = 2.6 * len(text)
        to_right = x + 12 + 2 * half < wide or x < wide / 2
        middle = x + (9 + half if to_right else -9 - half)
        # Not at the mark's own height: there run its interval and the front.
        shifts = [sign * (9.0 + 5.0 * n) for n in range(40) for sign in (1, -1)]
        boxes = {s: _box(middle, y + s, half, 5.5) for s in shifts if 0 <= y + s <= tall}
        shift = next((s for s, box in boxes.items() if not _covers(box, taken)), shifts[0])
        taken.append(_box(middle, y + shift, half, 5.5))
        note = axes.annotate(
            text, (dots[index].ms, heights[index]), xytext=(9 if to_right else -9, shift),
            textcoords="offset points", va="center", ha="left" if to_right else "right",
            fontsize=8.5, zorder=4,
            arrowprops=line if abs(shift) > 15 else None,
        )  # fmt: skip
        note.set_in_layout(False)  # the axes keep their width


def _box(x: float, y: float, half_width: float, half_height: float) -> tuple[float, ...]:
    return (x - half_width, x + half_width, y - half_height, y + half_height)


def _covers(box: tuple[float, ...], others: Sequence[tuple[float, ...]]) -> bool:
    return any(
        box[0] < right and left < box[1] and box[2] < upper and lower < box[3]
        for left, right, lower, upper in others
    )
