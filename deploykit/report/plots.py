"""Pictures of a report, as SVG that takes its colours from the page around it.

Matplotlib draws with stand-in colours, which become CSS variables afterwards: one picture is
right in light, in dark and in print. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from deploykit.report import wording
from deploykit.report.model import Report
from deploykit.report.view import worst_layers

__all__ = [
    "AFTER",
    "BAD",
    "BEFORE",
    "FOURTH",
    "INK",
    "PAPER",
    "SERIES",
    "SOFT",
    "THIRD",
    "WIDTH",
    "Plot",
    "draw",
    "drop_plot",
    "layer_plot",
    "plain_log_axis",
    "series_style",
    "worst_layers_plot",
]

# Stand-in colour: CSS variable. Odd values, so that no other colour is taken for one.
INK, SOFT, BEFORE, AFTER, BAD = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
THIRD, FOURTH, PAPER = "#101112", "#131415", "#161718"
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--line)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    BAD: "var(--bad)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
    PAPER: "var(--paper)",
}
# Line style and mark differ too: a picture must be right in grey and for the colour-blind.
SERIES = ((AFTER, "-", "o"), (THIRD, "--", "s"), (FOURTH, "-.", "^"), (INK, ":", "D"))
"""Colour, line style and mark of the files that are not the original."""
_STYLE = {
    "font.family": "DejaVu Sans",  # always there: the same widths on every machine
    "font.size": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer's name with $ is a name, not a formula
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": SOFT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}
WIDTH = 4.2
"""Inches: a little more than 1:1 on a phone, so that labels stay readable there."""


class Plot(NamedTuple):
    """One picture: inline SVG, and what it shows in words."""

    svg: str
    caption: str


def layer_plot(report: Report) -> Plot | None:
    """Signal to quantisation noise of every layer in network order, the worst ones marked."""
    finite = [layer for layer in report.layers if np.isfinite(layer.sqnr_db)]
    if not finite:
        return None
    worst = {id(layer) for layer in worst_layers(report, 5)}

    def paint(axes: Axes) -> None:
        values = [layer.sqnr_db for layer in finite]
        colours = [BAD if id(layer) in worst else AFTER for layer in finite]
        axes.bar(range(1, len(finite) + 1), values, color=colours, width=0.8)
        axes.set_xlabel("layers, in network order")
        axes.set_ylabel("SQNR, dB")
        axes.grid(axis="y")
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    caption = "Signal to quantisation noise by layer: low bars lose most, the five worst in red"
    return draw("layers", caption, 2.2, paint)


def worst_layers_plot(report: Report, count: int = 12) -> Plot | None:
    """The layers that lose most, by name."""
    worst = [layer for layer in worst_layers(report, count) if np.isfinite(layer.sqnr_db)]
    if not worst:
        return None

    def paint(axes: Axes) -> None:
        values = [layer.sqnr_db for layer in worst]
        colours = [BAD] * 5 + [AFTER] * count
        bars = axes.barh(range(len(worst)), values, color=colours[: len(worst)], height=0.6)
        names = [
            wording.clean(f"{wording.shorten(layer.layer, 28)}  {wording.shorten(layer.bits, 8)}")
            for layer in worst
        ]
        axes.set_yticks(range(len(worst)), names, fontsize=8.5)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=8.5)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel("SQNR, dB")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    caption = f"The {len(worst)} layers with the most quantisation noise and their bits"
    return draw("worst", caption, 0.7 + 0.24 * len(worst), paint)


def drop_plot(report: Report) -> Plot | None:
    """The change of top-1 with its interval, nought and the gate beside it."""
    accuracy = report.find_accuracy("compressed") if report.weights.trained else None
    if accuracy is None:
        return None
    gate = next((g.limit for g in report.gates if g.name == "max_drop"), None)

    def paint(axes: Axes) -> None:
        low, high = accuracy.drop - accuracy.drop_low, accuracy.drop_high - accuracy.drop
        axes.axvline(0, color=BEFORE, linewidth=1.2)
        axes.annotate("no change", (0, 0.72), color=INK, ha="left", xytext=(4, 0),
                      textcoords="offset points")  # fmt: skip
        axes.errorbar(
            [-accuracy.drop], [0], xerr=[[max(high, 0)], [max(low, 0)]],
            fmt="o", color=AFTER, capsize=5, linewidth=2, markersize=8,
        )  # fmt: skip
        if gate is not None:
            axes.axvline(-gate, color=BAD, linewidth=1.2, linestyle="--")
            axes.annotate("limit", (-gate, 0.72), color=BAD, ha="left", xytext=(4, 0),
                          textcoords="offset points")  # fmt: skip
        axes.set_ylim(-1, 1)
        axes.set_yticks([])
        axes.margins(x=0.25)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("change of top-1, percentage points")

    return draw("drop", "Change of top-1 accuracy, with its 95 % interval", 1.5, paint)


def series_style(names: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, line style and mark of each file: the original grey, ours in the house's colour."""
    others = [name for name in dict.fromkeys(names) if name not in ("original", "compressed")]
    styles = {"original": (BEFORE, "-", "o"), "compressed": SERIES[0]}
    return styles | {name: SERIES[1 + i % 3] for i, name in enumerate(others)}


def plain_log_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis where the values span more than three times, with plain numbers."""
    if low <= 0 or high <= 3 * low:
        return
    axes.set_xscale("log")
    few = high > 30 * low
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if few else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    # The usual labels are formulas, and the house's pictures take $ for a $.
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw(key: str, caption: str, height: float, paint: Callable[[Axes], None]) -> Plot:
    """Draw one picture; ``key`` keeps its ids apart from those of the others on the page."""
    stream = io.StringIO()
    style: Any = _STYLE | {"svg.hashsalt": key}  # the stub wants literal keys
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in a script the font lacks
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    return Plot(_for_page(stream.getvalue(), key, caption), caption)


def _for_page(svg: str, key: str, caption: str) -> str:
    svg = svg[svg.index("<svg") :]  # a page has one prologue already
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    # The rule for all elements would reach the whole page.
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'(<[^>]*\bid=")', rf"\g<1>{key}-", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    words = escape(caption)
    opening = f'<svg role="img" aria-label="{words}" '
    svg = svg.replace("<svg ", opening, 1)
    end = svg.index(">") + 1
    return f"{svg[:end]}<title>{words}</title>{svg[end:]}"
