"""Several reports as one matrix: files down, devices and targets across."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any, Literal

from pydantic import Field

from deploykit.report.matrix_notes import comparability, same_images
from deploykit.report.model import Report, strict_json
from deploykit.report.points import Point, points
from deploykit.report.view import flatten
from deploykit.report.wording import ratio_short, shorten
from deploykit.types import Data

__all__ = ["Cell", "Column", "Matrix", "Row", "Source", "build_matrix"]

# What a recipe says of where and how files are judged leaves the compressed model as it is.
_ELSEWHERE = ("targets", "measure", "gates", "verify", "export", "evaluation", "version")


class Source(Data):
    """One report that went in."""

    path: str
    model: str
    weights: str
    bits: str
    calibration: str
    recipe: str = Field(description="hash of what the recipe does to the model")
    started: str
    deploykit_version: str
    verdict: str
    exit_code: int


class Row(Data):
    """One kind of file: a model, what was done to it, and by what."""

    label: str = Field(description="unique in the matrix")
    model: str
    artifact: str
    precision: str
    algorithm: str
    recipe: str = Field(description="hash of the recipe; empty for the original")


class Column(Data):
    """One target on one device. Both are empty for files that nothing timed."""

    device: str
    target: str
    batch: int
    threads: int


class Cell(Data):
    """One file of one report in one place. A place may hold several, of different reports."""

    source: int = Field(description="index into sources")
    row: int = Field(description="index into rows")
    column: int = Field(description="index into columns")
    format: str
    bytes: int
    top1: float | None = Field(description="percent; null on untrained weights or if not measured")
    drop: float | None = Field(description="percentage points against the original")
    drop_low: float | None
    drop_high: float | None
    p50_ms: float | None
    p50_low_ms: float | None
    p50_high_ms: float | None
    ratio: float | None = Field(description="time against the original's")
    ratio_low: float | None
    ratio_high: float | None
    beside: str = Field(description="the same in words; '–' for the original itself")
    noisy: bool = Field(description="the median can't be used")
    best: bool = Field(
        description="on its column's Pareto front of top-1, time (by its interval) and size; of "
        "time and size where accuracies are absent or of different images"
    )


class Matrix(Data):
    """The reports together; ``notes`` say what in them can't be compared."""

    schema_version: Literal[1] = 1
    sources: list[Source]
    rows: list[Row]
    columns: list[Column]
    cells: list[Cell]
    comparable: bool = Field(description="all accuracies are of the same images")
    notes: list[str]

    def at(self, row: int, column: int) -> list[Cell]:
        """The cells of one place, in the order of their reports."""
        return [c for c in self.cells if (c.row, c.column) == (row, column)]

    def to_json(self) -> str:
        """Strict JSON."""
        return strict_json(self)


def build_matrix(reports: Sequence[tuple[str, Report]]) -> Matrix:
    """Put reports side by side; nothing of one replaces anything of another.

    Args:
        reports: each with where it was read from. One that is given twice counts once.
    """
    different: dict[str, tuple[str, Report]] = {}
    repeated = []
    for path, report in reports:
        if different.setdefault(report.to_json(), (path, report))[0] != path:
            repeated.append(f"{path} is the same report as {different[report.to_json()][0]}")
    kept = list(different.values())
    found = [(i, p, *_row(report, p)) for i, (_, report) in enumerate(kept) for p in points(report)]
    models = list(dict.fromkeys(row.model for *_, row in found))
    # Model by model, its original first.
    rows = {key: row for _, _, key, row in sorted(
        found, key=lambda f: (models.index(f[3].model), f[3].artifact != "original")
    )}  # fmt: skip
    recipes = {row.recipe: kept[source][1] for source, _, _, row in reversed(found)}
    columns = list(dict.fromkeys(_column(point) for _, point, _, _ in found))
    places = {key: index for index, key in enumerate(rows)}
    cells = [
        _cell(point, source, places[key], columns.index(_column(point)))
        for source, point, key, _ in found
    ]
    comparable = same_images([report for _, report in kept])
    return Matrix(
        sources=[_source(path, report) for path, report in kept],
        rows=_labelled(rows, recipes),
        columns=columns,
        cells=_with_best(cells, comparable),
        comparable=comparable,
        notes=[*repeated, *comparability([report for _, report in kept])],
    )


def recipe_id(report: Report) -> str:
    """Hash of what the recipe does to the model: the same wherever it ran and was judged."""
    kept = {key: value for key, value in report.recipe.items() if key not in _ELSEWHERE}
    text = json.dumps(_without_folders(kept), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _without_folders(value: Any) -> Any:
    """The same file lies elsewhere on another machine."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def _source(path: str, report: Report) -> Source:
    return Source(
        path=path,
        model=report.model,
        weights=report.weights.label,
        bits=report.bits,
        calibration=report.calibration,
        recipe=recipe_id(report),
        started=report.started,
        deploykit_version=report.deploykit_version,
        verdict=report.verdict,
        exit_code=report.exit_code,
    )


def _row(report: Report, point: Point) -> tuple[tuple[str, ...], Row]:
    artifact = point.artifact
    recipe = "" if artifact.name == "original" else recipe_id(report)
    weights = report.weights.sha256 or report.weights.label
    side = str(report.preprocessing.size)
    row = Row(
        label=f"{shorten(report.model)} {shorten(point.label)}",
        model=report.model,
        artifact=artifact.name,
        precision=artifact.precision,
        algorithm=artifact.algorithm,
        recipe=recipe,
    )
    key = (report.model, weights, side, artifact.name, artifact.precision, artifact.algorithm)
    return (*key, recipe), row


def _column(point: Point) -> Column:
    m = point.measurement
    if m is None:
        return Column(device="", target="", batch=0, threads=0)
    return Column(device=m.device.device, target=m.target, batch=m.batch, threads=m.device.threads)


def _cell(point: Point, source: int, row: int, column: int) -> Cell:
    m, accuracy = point.measurement, point.accuracy
    return Cell(
        source=source,
        row=row,
        column=column,
        format=point.artifact.format,
        bytes=point.artifact.bytes,
        top1=point.top1,
        drop=accuracy.drop if accuracy else None,
        drop_low=accuracy.drop_low if accuracy else None,
        drop_high=accuracy.drop_high if accuracy else None,
        p50_ms=m.p50_ms if m else None,
        p50_low_ms=m.p50_low_ms if m else None,
        p50_high_ms=m.p50_high_ms if m else None,
        ratio=m.ratio if m else None,
        ratio_low=m.ratio_low if m else None,
        ratio_high=m.ratio_high if m else None,
        beside=ratio_short(m) if m else "–",
        noisy=m.noisy if m else False,
        best=False,
    )


def _labelled(rows: dict[tuple[str, ...], Row], recipes: dict[str, Report]) -> list[Row]:
    """Rows of the same name are told apart by where their recipes differ, else by a number."""
    result: list[Row] = []
    for key, row in rows.items():
        twins = [other for other in rows.values() if other.label == row.label]
        label = row.label
        if len(twins) > 1:
            told = _difference(row.recipe, {twin.recipe for twin in twins}, recipes)
            label = f"{label} ({told})" if told else f"{label} (weights {shorten(key[1], 12)})"
        taken = {one.label for one in result}
        if label in taken:
            label = next(t for n in range(2, 10_000) if (t := f"{label} #{n}") not in taken)
        result.append(row.model_copy(update={"label": label}))
    return result


def _difference(own: str, all_: Iterable[str], recipes: dict[str, Report]) -> str:
    kept = {
        recipe: dict(flatten({
            k: _without_folders(v) for k, v in recipes[recipe].recipe.items() if k not in _ELSEWHERE
        }))
        for recipe in all_
    }  # fmt: skip
    names = [
        name
        for name in kept[own]
        # A setting that only one of them knows is one of another version of deploykit.
        if all(name in settings for settings in kept.values())
        and len({settings[name] for settings in kept.values()}) > 1
    ]
    if not names:
        return f"recipe {own}" if own else ""
    told = [f"{name}={shorten(kept[own][name], 24)}" for name in names[:3]]
    return ", ".join([*told, "…"] if len(names) > 3 else told)


def _with_best(cells: list[Cell], comparable: bool) -> list[Cell]:
    best: set[int] = set()
    for column in {cell.column for cell in cells}:
        there = [
            (index, cell)
            for index, cell in enumerate(cells)
            if cell.column == column and cell.p50_ms is not None and not cell.noisy
        ]
        rated = [(index, cell) for index, cell in there if cell.top1 is not None]
        by_accuracy = comparable and bool(rated)
        judged = rated if by_accuracy else there
        best |= {
            index
            for index, cell in judged
            if not any(_beats(other, cell, by_accuracy) for _, other in judged)
        }
    return [cell.model_copy(update={"best": i in best}) for i, cell in enumerate(cells)]


def _beats(one: Cell, other: Cell, by_accuracy: bool) -> bool:
    """Better in something and worse in nothing.

    Times are different only where their intervals are apart: a file does not beat itself by being
    timed twice. (Sizes and accuracies are ordered and so are intervals, so no ring can form.)
    """
    ahead = [
        one.bytes < other.bytes,
        by_accuracy and (one.top1 or 0) > (other.top1 or 0),
        (one.p50_high_ms or 0) < (other.p50_low_ms or 0),
    ]
    behind = [
        one.bytes > other.bytes,
        by_accuracy and (one.top1 or 0) < (other.top1 or 0),
        (one.p50_low_ms or 0) > (other.p50_high_ms or 0),
    ]
    return any(ahead) and not any(behind)
