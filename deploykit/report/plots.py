"""Pictures of a report, as SVG that takes its colours from the page around it.

Matplotlib draws with stand-in colours, which become CSS variables afterwards: one picture is
right in light, in dark and in print. The same report gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deploykit.report import wording
from deploykit.report.model import Report
from deploykit.report.view import worst_layers
from deploykit.types import Measurement

__all__ = [
    "AFTER",
    "BAD",
    "BEFORE",
    "INK",
    "SOFT",
    "Plot",
    "draw",
    "drop_plot",
    "latency_plots",
    "layer_plot",
    "size_plot",
]

# Stand-in colour: CSS variable. Odd values, so that no other colour is taken for one.
INK, SOFT, BEFORE, AFTER, BAD = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--line)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    BAD: "var(--bad)",
}
_STYLE = {
    "font.family": "DejaVu Sans",  # always there: the same widths on every machine
    "font.size": 9,
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
_WIDTH = 4.8  # inches: about 1:1 on a phone, so that labels stay readable there


class Plot(NamedTuple):
    """One picture: inline SVG, and what it shows in words."""

    svg: str
    caption: str


def latency_plots(report: Report) -> list[Plot]:
    """One picture a target: how the timed calls spread, original and compressed."""
    result = []
    for number, target in enumerate(dict.fromkeys(m.target for m in report.measurements)):
        pair = [
            m
            for name in ("original", "compressed")
            if (m := report.find_measurement(name, target)) is not None and len(m.samples_ms) > 1
        ]
        if pair:
            caption = (
                f"Every timed call on {wording.clean(target)}: dashed lines are the medians, "
                "the slowest 1 % stand in the last bar"
            )
            result.append(draw(f"latency{number}", caption, 2.4, _latency_painter(pair)))
    return result


def size_plot(report: Report) -> Plot | None:
    """The files' sizes as bars."""
    artifacts = sorted(report.artifacts, key=lambda a: a.name == "original")
    if not artifacts:
        return None

    def paint(axes: Axes) -> None:
        several = len({a.format for a in artifacts}) > 1
        names = [
            wording.shorten(wording.clean(a.name), 16)
            + f"\n{a.precision}"
            + (f", {wording.clean(a.format)}" if several else "")
            for a in artifacts
        ]
        sizes = [a.bytes / 1e6 for a in artifacts]
        colours = [BEFORE if a.name == "original" else AFTER for a in artifacts]
        bars = axes.barh(range(len(names)), sizes, color=colours, height=0.6)
        axes.set_yticks(range(len(names)), names)
        axes.bar_label(bars, [wording.bytes_text(a.bytes) for a in artifacts], padding=4)
        axes.margins(x=0.22)
        axes.set_xlabel("MB on disk")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return draw("size", "Size of the files", 0.7 + 0.5 * len(artifacts), paint)


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


def _latency_painter(pair: list[Measurement]) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        samples = [np.asarray(m.samples_ms, dtype=float) for m in pair]
        # A few stalls would squeeze everything else into one bar.
        low = min(float(s.min()) for s in samples)
        high = max(float(np.percentile(s, 99)) for s in samples)
        bins = np.linspace(low, high if high > low else low + 1e-3, 61)
        for measurement, values in zip(pair, samples, strict=True):
            colour = BEFORE if measurement.artifact == "original" else AFTER
            label = wording.clean(f"{measurement.artifact}, {measurement.precision}")
            inside = np.clip(values, bins[0], bins[-1])
            weights = np.full(len(values), 100 / len(values))
            axes.hist(inside, bins=list(bins), weights=weights, color=colour, alpha=0.75,
                      label=label)  # fmt: skip
            axes.axvline(measurement.p50_ms, color=colour, linestyle="--", linewidth=1.2)
        axes.set_xlabel("ms a call")
        axes.set_ylabel("% of calls")
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.22), ncols=2, borderaxespad=0)

    return paint


def draw(key: str, caption: str, height: float, paint: Callable[[Axes], None]) -> Plot:
    """Draw one picture; ``key`` keeps its ids apart from those of the others on the page."""
    stream = io.StringIO()
    style: Any = _STYLE | {"svg.hashsalt": key}  # the stub wants literal keys
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name in a script the font lacks
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
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
