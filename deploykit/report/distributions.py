"""How the timed calls spread: cumulative distributions, all files of a target together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes

from deploykit.report import wording
from deploykit.report.model import Report
from deploykit.report.plots import Plot, draw, plain_log_axis, series_style
from deploykit.types import Measurement

__all__ = ["distribution_plots"]

_MOST_STEPS = 200  # of a curve: more can't be seen and make the page heavy


def distribution_plots(report: Report) -> list[Plot]:
    """One picture for each target and batch: the share of calls that took at most so long."""
    places = dict.fromkeys((m.target, m.batch) for m in report.measurements)
    result = []
    for number, (target, batch) in enumerate(places):
        timed = [
            m
            for m in report.measurements
            if (m.target, m.batch) == (target, batch) and len(m.samples_ms) > 1
        ]
        if not timed:
            continue
        caption = (
            f"Every timed call on {wording.clean(target)}, batch {batch}: a curve further left is "
            "faster, a steeper one steadier; dots are the medians"
        )
        height = 2.3 + 0.17 * len(timed)
        result.append(draw(f"latency{number}", caption, height, _painter(timed)))
    return result


def _painter(timed: Sequence[Measurement]) -> Callable[[Axes], None]:
    styles = series_style([m.artifact for m in timed])

    def paint(axes: Axes) -> None:
        shares = np.linspace(0, 1, _MOST_STEPS)
        low, high = np.inf, 0.0
        for m in timed:
            samples = np.asarray(m.samples_ms, dtype=float)
            # A share is that of real calls: nothing is drawn between two of them.
            steps = shares if len(samples) > _MOST_STEPS else np.linspace(0, 1, len(samples))
            curve = np.quantile(samples, steps, method="inverted_cdf")
            colour, line, mark = styles[m.artifact]
            label = wording.shorten(wording.clean(f"{m.artifact}, {m.precision}"), 40)
            label += " (too noisy)" if m.noisy else ""
            axes.step(curve, 100 * steps, where="post", color=colour, linestyle=line, label=label,
                      linewidth=1.6)  # fmt: skip
            axes.plot([m.p50_ms], [50], mark, color=colour, markersize=5)
            low = min(low, float(curve[0]))
            high = max(high, float(np.quantile(samples, 0.995)))
        plain_log_axis(axes, low, high)
        axes.set_xlim(low * 0.95, max(high, low * 1.02) * 1.03)  # rare stalls run off the picture
        axes.set_ylim(0, 101)
        axes.set_xlabel("ms a call" + (", log scale" if axes.get_xscale() == "log" else ""))
        axes.set_ylabel("% of calls")
        axes.grid()
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, fontsize=8.5)

    return paint
