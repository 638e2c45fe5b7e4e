"""What is left of the original: size, memory and time of the file that ships, in percent."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes

from deploykit.report import wording
from deploykit.report.model import Report
from deploykit.report.plots import AFTER, BAD, BEFORE, SOFT, Plot, draw

__all__ = ["Gain", "gains", "gains_plot"]

_SAME = 0.005  # a difference that rounds away


@dataclass(frozen=True)
class Gain:
    """One line of the picture: percent of the original's, with its interval where it has one."""

    label: str
    percent: float
    interval: tuple[float, float] | None
    said: str


def gains(report: Report) -> list[Gain]:
    """Size, then time and peak memory target by target; nothing that is unknown or too noisy."""
    result = []
    before, after = report.find_artifact("original"), report.find_artifact("compressed")
    if before and after and before.bytes and before.format == after.format:
        result.append(_gain("size of the file", after.bytes, before.bytes))
    for target in dict.fromkeys(m.target for m in report.measurements):
        new = report.find_measurement("compressed", target)
        old = report.find_measurement("original", target)
        if new is None or old is None:
            continue
        said = wording.ratio_short(new)
        if new.ratio is not None and said not in ("–", wording.TOO_NOISY):
            low, high = new.ratio_low, new.ratio_high
            between = (100 * low, 100 * high) if low is not None and high is not None else None
            result.append(Gain(f"time, {target}", 100 * new.ratio, between, said))
        if new.peak_rss_bytes and old.peak_rss_bytes:
            result.append(_gain(f"memory, {target}", new.peak_rss_bytes, old.peak_rss_bytes))
    return result


def gains_plot(report: Report) -> Plot | None:
    """A bar a line; the grey ground is the original."""
    found = gains(report)
    if not found:
        return None

    def paint(axes: Axes) -> None:
        places = range(len(found))
        longest = max(100.0, *(g.percent for g in found))
        axes.barh(places, [100] * len(found), color=SOFT, height=0.62)
        colours = [BAD if g.percent > 100 * (1 + _SAME) else AFTER for g in found]
        axes.barh(places, [g.percent for g in found], color=colours, height=0.62)
        axes.axvline(100, color=BEFORE, linewidth=1.2)
        for place, gain in zip(places, found, strict=True):
            if gain.interval is not None:
                axes.hlines(place, *gain.interval, color=BEFORE, linewidth=2)
            text = f"{gain.percent:.0f} %, {gain.said}"
            axes.annotate(text, (longest, place), xytext=(5, 0), textcoords="offset points",
                          va="center", fontsize=8.5)  # fmt: skip
        names = [wording.shorten(wording.clean(g.label), 28) for g in found]
        axes.set_yticks(places, names, fontsize=8.5)
        axes.invert_yaxis()
        axes.set_xlim(0, longest * 2.05)
        axes.set_xticks([0, 50, 100])
        axes.set_xlabel("% of the original")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    caption = "What is left of the original: the grey ground is 100 %, shorter is better"
    return draw("gains", caption, 0.7 + 0.34 * len(found), paint)


def _gain(label: str, after: int, before: int) -> Gain:
    ratio = before / after if after else 0.0
    said = f"{ratio:.2f}× smaller" if ratio >= 1 else f"{after / before:.2f}× larger"
    if abs(after - before) < _SAME * before:
        said = "about the same"
    return Gain(label, 100 * after / before, None, said)
