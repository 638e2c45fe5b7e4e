"""From the original to the compressed file, step by step: what each gained and what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes

from deploykit.report import wording
from deploykit.report.model import Report
from deploykit.report.plots import AFTER, BAD, BEFORE, INK, Plot, draw
from deploykit.types import STAGES, Artifact, Measurement

__all__ = ["Step", "step_plots", "steps"]


@dataclass(frozen=True)
class Step:
    """A file on the way, beside the one before it.

    Attributes:
        label: the file's name and precision.
        times: percent of the original's time on each target; None if not measured or too noisy.
        top1: percent; None if not measured or refused.
        megabytes: of the file.
    """

    label: str
    times: dict[str, float | None]
    top1: float | None
    megabytes: float


def steps(report: Report) -> list[Step]:
    """Original, each step and the compressed file; empty where nothing lies between the two."""
    order = ("original", *STAGES, "compressed")
    found: dict[str, Artifact] = {}
    for artifact in report.artifacts:  # the first format is that of the first target
        found.setdefault(artifact.name, artifact)
    if not any(name in found for name in STAGES):
        return []
    return [_step(report, found[name]) for name in order if name in found]


def _step(report: Report, artifact: Artifact) -> Step:
    times = {}
    for target in dict.fromkeys(m.target for m in report.measurements):
        found = report.find_measurement(artifact.name, target)
        times[target] = _percent(found) if found else None
    top1 = None
    if report.weights.trained and report.accuracy:
        if artifact.name == "original":
            top1 = report.accuracy[0].top1_original
        else:
            accuracy = report.find_accuracy(artifact.name)
            top1 = accuracy.top1 if accuracy else None
    label = artifact.name if artifact.precision == "fp32" else artifact.precision
    return Step(wording.clean(label), times, top1, artifact.bytes / 1e6)


def _percent(measurement: Measurement) -> float | None:
    if measurement.artifact == "original":
        return 100.0
    if measurement.ratio is None or wording.ratio_short(measurement) == wording.TOO_NOISY:
        return None
    return 100 * measurement.ratio


def step_plots(report: Report) -> list[Plot]:
    """Waterfalls: time, top-1 and size from the original to the file that ships."""
    found = steps(report)
    if not found:
        return []
    columns: list[tuple[str, str, list[float | None], bool]] = [
        (f"time{number}", f"% of the original's time on {wording.clean(target)}",
         [s.times[target] for s in found], True)
        for number, target in enumerate(found[0].times)
    ] + [
        ("top1", "top-1, %", [s.top1 for s in found], False),
        ("size", "size of the file, MB", [s.megabytes for s in found], True),
    ]  # fmt: skip
    result = []
    for key, unit, values, less_is_better in columns:
        known = [(s.label, v) for s, v in zip(found, values, strict=True) if v is not None]
        if len(known) > 2:
            height = 0.7 + 0.32 * len(known)
            paint = _painter(known, unit, less_is_better)
            result.append(draw(f"step-{key}", f"Step by step: {unit}", height, paint))
    return result


def _painter(
    known: list[tuple[str, float]], unit: str, less_is_better: bool
) -> Callable[[Axes], None]:
    def paint(axes: Axes) -> None:
        values = [value for _, value in known]
        last = len(known) - 1
        for row, (_, value) in enumerate(known):
            before = values[row - 1] if row else value
            if row == 0:
                axes.barh(row, value, color=BEFORE, height=0.6)
            else:
                better = (value < before) == less_is_better
                axes.barh(row, value, color=AFTER, height=0.6, alpha=0.25 if row < last else 0.6)
                axes.barh(row, value - before, left=before, height=0.6,
                          color=AFTER if better else BAD)  # fmt: skip
            text = f"{value:.1f}"
            if row:
                text += f" ({wording.change(value - before, 1)})"
            axes.annotate(text, (max(value, before), row), xytext=(4, 0), va="center",
                          textcoords="offset points", color=INK, fontsize=8)  # fmt: skip
        axes.set_yticks(range(len(known)), [label for label, _ in known])
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.25)
        if not less_is_better:  # a few points of a hundred would not be seen
            spread = max(max(values) - min(values), 1.0)
            axes.set_xlim(max(0.0, min(values) - spread), max(values) + 0.6 * spread)
        axes.grid(axis="x")

    return paint
