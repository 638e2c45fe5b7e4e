"""What in several reports can't be compared, each in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deploykit.report.model import Report
from deploykit.report.wording import percent, shorten

__all__ = ["comparability", "same_images"]


def same_images(reports: Sequence[Report]) -> bool:
    """All accuracies were measured on the same images."""
    return len({_images(report) for report in reports} - {None}) <= 1


def comparability(reports: Sequence[Report]) -> list[str]:
    """Reports are called by their numbers, from 1, in the order they were given."""
    notes = []
    untrained = [i for i, report in enumerate(reports) if not report.weights.trained]
    if untrained:
        notes.append(f"untrained weights, so no accuracy: {_numbers(untrained)}")
    unrated = [i for i, r in enumerate(reports) if r.weights.trained and not r.accuracy]
    if unrated:
        notes.append(f"accuracy was not measured: {_numbers(unrated)}")
    for read, says in (
        (lambda r: r.model, "different models"),
        (_images, "accuracy on different images: compare the changes, not top-1 itself"),
        (lambda r: r.calibration, "calibrated on different images"),
        (lambda r: r.deploykit_version, "made by different versions of deploykit"),
        (_batches, "timed at different batches"),
        (_threads, "timed with different numbers of threads"),
    ):  # type: tuple[Callable[[Report], str | None], str]
        groups = _groups(reports, read)
        if len(groups) > 1:
            notes.append(f"{says}: {_listed(groups)}")
    return notes + _weights(reports) + _originals(reports) + _runtimes(reports)


def _weights(reports: Sequence[Report]) -> list[str]:
    notes = []
    for model in dict.fromkeys(report.model for report in reports):

        def read(report: Report, model: str = model) -> str | None:
            known = (report.weights.sha256 or "")[:12] or report.weights.label
            return known if report.model == model else None

        groups = _groups(reports, read)
        if len(groups) > 1:
            notes.append(f"{model} with different weights: {_listed(groups)}")
    return notes


def _originals(reports: Sequence[Report]) -> list[str]:
    """The same network on the same images must have one top-1."""
    notes = []
    keys = dict.fromkeys(
        (report.model, report.weights.sha256, a.data, a.images)
        for report in reports
        if report.weights.trained and report.weights.sha256
        for a in report.accuracy
    )
    for key in keys:

        def read(report: Report, key: tuple[object, ...] = key) -> str | None:
            found = [
                a.top1_original for a in report.accuracy
                if (report.model, report.weights.sha256, a.data, a.images) == key
            ]  # fmt: skip
            return percent(found[0]) if found and report.weights.trained else None

        groups = _groups(reports, read)
        if len(groups) > 1:
            notes.append(
                f"{key[0]}: the original's own top-1 differs on the same images, so preprocessing "
                f"or runtime do: {_listed(groups)}"
            )
    return notes


def _runtimes(reports: Sequence[Report]) -> list[str]:
    notes = []
    places = dict.fromkeys((m.device.device, m.target) for r in reports for m in r.measurements)
    for place in places:

        def read(report: Report, place: tuple[str, str] = place) -> str | None:
            found = {
                m.device.runtime for m in report.measurements
                if (m.device.device, m.target) == place
            }  # fmt: skip
            return ", ".join(sorted(found)) or None

        groups = _groups(reports, read)
        if len(groups) > 1:
            notes.append(f"{place[1]} in different versions: {_listed(groups)}")
    return notes


def _images(report: Report) -> str | None:
    if not report.weights.trained:
        return None
    found = dict.fromkeys((a.data, a.images) for a in report.accuracy)
    said = (d if str(n) in d else f"{d}, {n} images" for d, n in found)
    return "; ".join(said) or None


def _batches(report: Report) -> str | None:
    return ", ".join(str(b) for b in sorted({m.batch for m in report.measurements})) or None


def _threads(report: Report) -> str | None:
    found = sorted({m.device.threads for m in report.measurements})
    return ", ".join(map(str, found)) or None


def _groups(
    reports: Sequence[Report], read: Callable[[Report], str | None]
) -> dict[str, list[int]]:
    """Which reports say what; those that say nothing are left out."""
    groups: dict[str, list[int]] = {}
    for index, report in enumerate(reports):
        if (value := read(report)) is not None:
            groups.setdefault(value, []).append(index)
    return groups


def _listed(groups: dict[str, list[int]]) -> str:
    return "; ".join(f"{shorten(v, 60)} {_numbers(where)}" for v, where in groups.items())


def _numbers(indices: Sequence[int]) -> str:
    return f"[{', '.join(str(index + 1) for index in indices)}]"
