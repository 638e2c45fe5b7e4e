"""Tables that are made from whatever the data hold: parity, devices, measurements in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from deploykit.report.view import flatten
from deploykit.report.wording import clean
from deploykit.types import Measurement, ParityRow

__all__ = ["ParityGrid", "ParityLine", "Table", "device_facts", "parity_grid", "timing_facts"]


class Table(NamedTuple):
    """A name and a text for each column; rows that no column fills are left out."""

    columns: list[str]
    rows: list[tuple[str, list[str]]]


class ParityLine(NamedTuple):
    """One file, or one feature map of it, in one runtime; a cell for each batch, empty where it
    was not compared."""

    artifact: str
    format: str
    precision: str
    runtime: str
    reference: str
    level: str
    cells: list[list[ParityRow]]


class ParityGrid(NamedTuple):
    """Files and formats down, batches across."""

    batches: list[int]
    rows: list[ParityLine]


def parity_grid(rows: Sequence[ParityRow]) -> ParityGrid:
    """The comparisons, one line a file and runtime."""
    batches = sorted({row.batch for row in rows})
    groups: dict[tuple[str, str, str, str, str, str], list[ParityRow]] = {}
    for row in rows:
        key = (row.artifact, row.format, row.precision, row.runtime, row.reference, row.level)
        groups.setdefault(key, []).append(row)
    lines = [
        ParityLine(*key, [[row for row in found if row.batch == batch] for batch in batches])
        for key, found in groups.items()
    ]
    return ParityGrid(batches, lines)


def device_facts(measurements: Sequence[Measurement]) -> Table:
    """Everything that is known of what ran the files, target by target.

    Fields are taken as they come, so that a new one is shown without a change here. Where the
    files of a target differ (each has a process of its own), all values are listed.
    """
    columns: dict[str, dict[str, list[str]]] = {}
    for m in measurements:
        facts = columns.setdefault(clean(m.target), {})
        for name, value in flatten(m.device.model_dump(mode="json", exclude={"target"})):
            values = facts.setdefault(name, [])
            if value not in values:
                values.append(value)
    return _table({target: {k: "; ".join(v) for k, v in facts.items()}
                   for target, facts in columns.items()})  # fmt: skip


def timing_facts(measurements: Sequence[Measurement]) -> Table:
    """Every figure of every measurement but the timed calls themselves, as they come."""
    columns = {}
    for m in measurements:
        name = clean(f"{m.artifact} {m.precision} ({m.format}), {m.target}, batch {m.batch}")
        hidden = {"device", "samples_ms", "artifact", "format", "target", "batch"}
        columns[name] = dict(flatten(m.model_dump(mode="json", exclude=hidden)))
    return _table(columns)


def _table(columns: Mapping[str, Mapping[str, str]]) -> Table:
    names = dict.fromkeys(name for facts in columns.values() for name in facts)
    rows = [
        (name.replace("_", " "), [facts.get(name, "") or "–" for facts in columns.values()])
        for name in names
    ]
    return Table(list(columns), [row for row in rows if set(row[1]) != {"–"}])
