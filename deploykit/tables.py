"""Tables the commands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit.backbones.inspection import Inspection
from deploykit.backbones.registry import BackboneSpec
from deploykit.types import GateResult, ParityRow

__all__ = [
    "backbones_table",
    "doctor_table",
    "gates_table",
    "new_table",
    "parity_table",
    "print_inspection",
]


def new_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """A table as all commands print them; the columns in ``right`` hold figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        side: Any = "right" if column in set(right) else "left"
        table.add_column(column, justify=side, overflow="fold")
    return table


def backbones_table(specs: Sequence[BackboneSpec]) -> Table:
    """Name, paper's name, size, input, licence of the weights."""
    table = new_table("name", "model", "params M", "input", "weights", right=("params M", "input"))
    for spec in specs:
        cells = (
            spec.name,
            spec.paper_name,
            "" if spec.params_m is None else f"{spec.params_m:g}",
            "" if spec.input is None else str(spec.input),
            spec.licence or "",
        )
        table.add_row(*map(Text, cells))
    return table


def parity_table(rows: Sequence[ParityRow]) -> Table:
    """Every comparison of a file with its graph."""
    table = new_table("file", "format", "runtime", "batch", "SQNR", "top-1", "", "wanted",
                   right=("batch", "SQNR", "top-1"))  # fmt: skip
    for row in rows:
        cells = (
            f"{row.artifact} {row.level}".strip(),
            row.format,
            row.runtime,
            str(row.batch),
            f"{row.sqnr_db:.1f} dB",
            "–" if row.top1_agreement is None else f"{row.top1_agreement:.4g} %",
            "ok" if row.passed else "MISSED",
            "" if row.passed else row.tolerance,
        )
        table.add_row(*map(Text, cells))
    return table


def print_inspection(found: Inspection, console: Console) -> None:
    """Everything ``deploykit inspect`` knows, in three short tables."""
    console.print(Text(f"{found.name}  ({found.family or 'own model'})", style="bold"))
    facts = new_table("fact", "value")
    prep = found.preprocessing
    for name, value in (
        ("parameters", f"{found.params:,}"),
        ("MACs", f"{found.macs:,} for one image"),
        *(
            (level.name, f"{level.channels} x {level.height} x {level.width}, "
             f"stride {level.stride:g}") for level in found.levels
        ),
        *([] if found.levels else [("classes", str(found.num_classes))]),
        ("input", f"3 x {prep.size} x {prep.size}, {found.input_policy} size"),
        ("preprocessing", f"{prep.interpolation}, crop {prep.crop_pct:g}"),
        ("mean, std", f"{prep.mean}, {prep.std}"),
        ("weights", found.weights.label),
    ):  # fmt: skip
        facts.add_row(Text(name), Text(value))
    console.print(facts)
    reach = new_table("technique", "reaches", "of", "why not the rest", right=("reaches", "of"))
    for technique, row in found.reach.items():
        cells = (technique, str(row["reaches"]), str(row["of"]), str(row["why"]))
        reach.add_row(*map(Text, cells))
    console.print(reach)
    ops = ", ".join(f"{name} {count}" for name, count in found.captured_ops.items())
    console.print(Text(f"captured operators: {ops}"))
    for note in found.notes:
        console.print(Text(f"note: {note}"))


def gates_table(gates: Sequence[GateResult]) -> Table:
    """One row a gate."""
    table = new_table("gate", "held", "reason")
    for gate in gates:
        held = Text("yes", style="green") if gate.passed else Text("no", style="red")
        table.add_row(Text(gate.name), held, Text(gate.reason))
    return table


def doctor_table(rows: Sequence[tuple[str, str | None]], environment: dict[str, Any]) -> Table:
    """Targets and what is missing for each, then the machine and the packages."""
    table = new_table("what", "state")
    for name, reason in rows:
        state = Text("ok", style="green") if reason is None else Text(reason, style="yellow")
        table.add_row(Text(f"target {name}"), state)
    table.add_section()
    for name in ("deploykit", "python", "os", "cpu", "cores_allowed", "gpu"):
        table.add_row(Text(name), Text(str(environment[name])))
    for name, version in environment["packages"].items():
        table.add_row(Text(name), Text(str(version)))
    return table
