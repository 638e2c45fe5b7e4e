"""What every rendering shows, worked out once: comparison rows, headline figures, the banner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deploykit.report import wording
from deploykit.report.model import LayerError, Report
from deploykit.types import Accuracy, Artifact, Fidelity, Measurement

__all__ = [
    "Card",
    "Row",
    "accuracy_text",
    "cards",
    "fidelity",
    "flatten",
    "headline",
    "mood",
    "rows",
    "verdict",
    "worst_layers",
]

Mood = Literal["good", "bad", "doubt", "plain"]

_MOST_GAINS = 4  # in the sentence on top; the table has all


@dataclass(frozen=True)
class Row:
    """One artefact on one target (or on none, when nothing was timed)."""

    artifact: str
    precision: str
    algorithm: str
    target: str
    top1: str
    size: str
    measurement: Measurement | None

    @property
    def p50(self) -> str:
        """The median, or a dash."""
        return wording.ms(self.measurement.p50_ms if self.measurement else None)

    @property
    def ratio(self) -> str:
        """Beside the original: ``2.10× faster``."""
        if self.measurement is None or self.artifact == "original":
            return "–"
        return wording.ratio_short(self.measurement)

    @property
    def peak(self) -> str:
        """Peak memory of the process."""
        return wording.bytes_text(self.measurement.peak_rss_bytes if self.measurement else None)


@dataclass(frozen=True)
class Card:
    """One headline figure: what, how much, beside what."""

    title: str
    value: str
    note: str
    mood: Mood = "plain"


def rows(report: Report) -> list[Row]:
    """The comparison, target by target, the original first."""
    ordered = sorted(report.artifacts, key=lambda a: a.name != "original")
    targets = list(dict.fromkeys(m.target for m in report.measurements)) or [""]
    several = len({artifact.format for artifact in report.artifacts}) > 1
    result: list[Row] = []
    untimed: list[Row] = []
    for target in targets:
        for artifact in ordered:
            measurement = report.find_measurement(artifact.name, target)
            if measurement is not None and measurement.format != artifact.format:
                measurement = None
            elsewhere = any(
                (m.artifact, m.format) == (artifact.name, artifact.format)
                for m in report.measurements
            )
            if measurement is None and (elsewhere or target != targets[-1]):
                continue
            precision = measurement.precision if measurement else artifact.precision
            if several:
                precision = f"{precision}, {artifact.format}"
            (result if measurement or not target else untimed).append(
                Row(
                    artifact=wording.clean(artifact.name),
                    precision=wording.clean(precision),
                    algorithm=wording.clean(artifact.algorithm),
                    target=wording.clean(target) if measurement else "",
                    top1=accuracy_text(report, artifact),
                    size=wording.bytes_text(artifact.bytes),
                    measurement=measurement,
                )
            )
    return [*result, *untimed]


def accuracy_text(report: Report, artifact: Artifact) -> str:
    """Top-1 of a file; a refusal on untrained weights, whatever else is in the report."""
    if report.levels:
        return wording.NO_CLASSES
    if not report.weights.trained:
        return wording.REFUSED
    measured = [a for a in report.accuracy if a.format == artifact.format]
    if artifact.name == "original" and measured:
        return wording.percent(measured[0].top1_original)
    accuracy = next((a for a in measured if a.artifact == artifact.name), None)
    return wording.percent(accuracy.top1) if accuracy else "not measured"


@dataclass(frozen=True)
class FidelityRow:
    """One feature map of one file, beside the original file's."""

    fact: Fidelity
    shape: str
    error: str


def fidelity(report: Report) -> list[FidelityRow]:
    """Feature maps in order, and under each the files."""
    shapes = {
        level.name: f"{level.channels} × {level.height} × {level.width}, stride {level.stride:g}"
        for level in report.levels
    }
    order = list(shapes)
    return [
        FidelityRow(row, shapes.get(row.level, "–"), wording.percent(100 * row.relative_error))
        for row in sorted(report.fidelity, key=lambda row: order.index(row.level))
    ]


def verdict(report: Report) -> str:
    """The verdict in words. A run that was held to nothing is not called OK."""
    if report.verdict == "ok" and not _limited(report):
        return "Measured, no limit was set"
    return {"ok": "OK"}.get(report.verdict, report.verdict.capitalize())


def _limited(report: Report) -> bool:
    """Whether anything but parity, which every file is held to, was asked for."""
    return any(gate.name != "parity" for gate in report.gates)


def mood(report: Report) -> Mood:
    """The colour of the verdict; without limits, a loss that is certain is a doubt."""
    if report.verdict == "ok":
        found = report.find_accuracy("compressed")
        lost = found is not None and found.drop_low > 0
        return "doubt" if lost and not _limited(report) else "good"
    return "doubt" if report.verdict == "accuracy not measured" else "bad"


def headline(report: Report) -> str:
    """The run in one sentence: how much smaller and faster, and what it cost."""
    compressed, original = report.find_artifact("compressed"), report.find_artifact("original")
    if compressed is None or original is None or not compressed.bytes:
        return "The run wrote no compressed file to compare with the original."
    gains = [_size_card(compressed, original).value]
    for m in report.measurements:
        said = wording.ratio_short(m)
        if m.artifact == "compressed" and ("faster" in said or "slower" in said):
            gains.append(f"{said} on {wording.clean(m.target)}")
    more = len(gains) - _MOST_GAINS
    gains = [*gains[:_MOST_GAINS], f"so on ({more} more)"] if more > 1 else gains
    text = f"{wording.clean(compressed.precision)} is {_and(gains)} than the original"
    if report.levels:
        worst = _worst_map(report)
        if worst is None:
            return f"{text}; its feature maps were not compared with the original's."
        near = wording.sqnr(worst.sqnr_db)
        trained = "" if report.weights.trained else ", of untrained weights"
        return f"{text}; its feature maps have {near} or better beside the original's{trained}."
    if not report.weights.trained:
        return f"{text}; its accuracy can't be known, as the weights are untrained."
    found = [a for a in report.accuracy if a.artifact == "compressed"]
    if not found:
        return f"{text}; its accuracy was not measured."
    accuracy = max(found, key=lambda a: a.drop)  # of the worst file
    low, high = wording.change(-accuracy.drop_high), wording.change(-accuracy.drop_low)
    points = wording.change(-accuracy.drop)
    return f"{text}; top-1 changed by {points} points (95 % interval {low} … {high})."


def cards(report: Report) -> list[Card]:
    """The figures a person reads first."""
    compressed = report.find_artifact("compressed")
    timed = [m for m in report.measurements if m.artifact == "compressed"]
    result = [_accuracy_card(report)]
    if compressed is not None:
        result.append(_size_card(compressed, report.find_artifact("original")))
    result += [_latency_card(report, m) for m in timed[:2]]
    if report.own_parity:
        missed = sum(not row.passed for row in report.own_parity)
        count = len(report.own_parity)
        result.append(
            Card(
                "Parity of the file",
                f"{count - missed} of {count}",
                "comparisons within tolerance",
                "bad" if missed else "good",
            )
        )
    return result


def worst_layers(report: Report, count: int = 12) -> list[LayerError]:
    """The layers with the most quantisation noise."""
    return sorted(report.layers, key=lambda layer: layer.sqnr_db)[:count]


def flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as dotted names and short texts, for a table."""
    result = []
    for key, value in data.items():
        name = f"{prefix}{wording.clean(key)}"
        if isinstance(value, Mapping):
            result += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            result.append((name, ", ".join(wording.clean(item) for item in value)))
        else:
            result.append((name, "–" if value is None else wording.clean(value)))
    return result


def _and(texts: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _worst_map(report: Report) -> Fidelity | None:
    found = [row for row in report.fidelity if row.artifact == "compressed"]
    return min(found, key=lambda row: row.sqnr_db, default=None)


def _accuracy_card(report: Report) -> Card:
    if report.levels:
        worst = _worst_map(report)
        if worst is None:
            return Card("Feature maps", "not compared", "with the original's", "doubt")
        note = f"SQNR of {worst.level}, the worst map, on {worst.images} images"
        return Card("Feature maps", wording.sqnr(worst.sqnr_db), note)
    if not report.weights.trained:
        return Card("Top-1 accuracy", "refused", "untrained weights", "bad")
    accuracy: Accuracy | None = report.find_accuracy("compressed")
    if accuracy is None:
        return Card("Top-1 accuracy", "not measured", "give labelled images with --data", "doubt")
    low, high = wording.change(-accuracy.drop_high), wording.change(-accuracy.drop_low)
    note = (
        f"{wording.percent(accuracy.top1_original)} → {wording.percent(accuracy.top1)}, "
        f"95 % interval {low} … {high}, {accuracy.images} images"
    )
    lost_for_sure = accuracy.drop_low > 0
    value = f"{wording.change(-accuracy.drop)} points"
    return Card("Top-1 accuracy", value, note, "doubt" if lost_for_sure else "good")


def _size_card(compressed: Artifact, original: Artifact | None) -> Card:
    size = wording.bytes_text(compressed.bytes)
    if original is None or not compressed.bytes:
        return Card("Size of the file", size, "nothing to compare it with")
    ratio = original.bytes / compressed.bytes
    value = f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / ratio:.2f}× larger"
    note = f"{wording.bytes_text(original.bytes)} → {size}"
    return Card("Size of the file", value, note, "good" if ratio > 1 else "bad")


def _latency_card(report: Report, measurement: Measurement) -> Card:
    title = f"Latency on {wording.clean(measurement.target)}"
    original = report.find_measurement("original", measurement.target)
    new = f"{wording.ms(measurement.p50_ms)} ms"
    note = f"median {wording.ms(original.p50_ms)} → {new}" if original else f"median {new}"
    if measurement.noisy:
        return Card(title, "too noisy", f"{note}; measure again on a quiet machine", "doubt")
    value = wording.ratio_short(measurement)
    if value == "–":
        return Card(title, new, "median; the original was not measured beside it")
    tone: Mood = "good" if "faster" in value else "bad" if "slower" in value else "doubt"
    return Card(title, value, f"{note}, batch\N{NO-BREAK SPACE}{measurement.batch}", tone)
