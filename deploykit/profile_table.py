"""Profiles as tables for the terminal: a layer a row, the costliest first."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from deploykit.layer_profile import UNMAPPED, LayerCost, layer_costs
from deploykit.report import wording
from deploykit.tables import new_table
from deploykit.types import LayerProfile

__all__ = ["UNMAPPED_TITLE", "profile_table", "sorted_costs"]

UNMAPPED_TITLE = "(kernels of no known layer)"


def sorted_costs(profile: LayerProfile) -> list[LayerCost]:
    """The layers, the costliest first."""
    return sorted(layer_costs(profile).values(), key=lambda cost: -cost.ms)


def profile_table(
    profile: LayerProfile, floats: LayerProfile | None = None, most: int | None = None
) -> Table:
    """A file's layers, in ms, beside the float file's if there is one.

    Args:
        most: rows at most; the rest is summed in one more.
    """
    columns = ["layer", "kernel", "ms", "share", "Q/DQ", "moves"]
    beside = layer_costs(floats) if floats else {}
    if floats:
        columns += ["float", "times"]
    table = new_table(*columns, right=columns[2:])
    costs = sorted_costs(profile)
    shown = costs if most is None else costs[:most]
    for cost in shown:
        title = wording.shorten(cost.name, 32) if cost.name != UNMAPPED else UNMAPPED_TITLE
        cells = [title, f"{cost.kernel} {cost.precision}".strip(), *_sum([cost], profile)]
        if floats:
            before = beside.get(cost.name)
            cells += ["", ""] if before is None else [_ms(before.ms), f"{cost.ms / before.ms:.2f}"]
        table.add_row(*map(Text, cells))
    rest = costs[len(shown) :]
    if rest:
        cells = [f"{len(rest)} more", "", *_sum(rest, profile)]
        if floats:
            known = [beside[cost.name].ms for cost in rest if cost.name in beside]
            cells += [_ms(sum(known)), ""]
        table.add_row(*map(Text, cells))
    table.add_section()
    cells = ["all", "", *_sum(costs, profile)]
    if floats:
        cells += [_ms(floats.total_ms), f"{profile.total_ms / floats.total_ms:.2f}"]
    table.add_row(*(Text(cell, style="bold") for cell in cells))
    return table


def _sum(costs: Sequence[LayerCost], profile: LayerProfile) -> list[str]:
    """All of it, its share, and of it the Q/DQ and the moving of values."""
    whole = sum(cost.ms for cost in costs)
    parts = [sum(cost.parts.get(kind, 0.0) for cost in costs) for kind in ("quantise", "reformat")]
    share = f"{100 * whole / profile.total_ms:.1f} %"
    return [_ms(whole), share, *(_ms(one) if one else "" for one in parts)]


def _ms(value: float) -> str:
    return f"{value:.3f}"
