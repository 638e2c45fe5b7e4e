"""Giving each layer its width under a budget: a multiple-choice knapsack.

Costs and scores add up over layers. Nothing here knows what a cost is: bits, bytes or
milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from deploykit.errors import UsageError

__all__ = ["Method", "Table", "allocate", "total"]

Method = Literal["ilp", "greedy"]
Table = Mapping[str, Mapping[str, float]]
"""layer to width to figure; each layer's widths stand widest first."""

_TRIES = 20
_MARGIN = 1e-7  # of the budget: HiGHS keeps a constraint to within 1e-6 of its own scale


def allocate(
    scores: Table, costs: Table, budget: float, method: Method = "ilp", *, unit: str = ""
) -> dict[str, str]:
    """The width of each layer: least sum of scores whose sum of costs is within the budget.

    ``greedy`` starts each layer at its first (widest) width and, until the budget is met, lowers
    the one whose score rises least for the cost it saves. ``ilp`` is exact (HiGHS branch and
    bound): one 0/1 variable a layer and width, of which each layer takes one.

    Args:
        scores, costs: the same layers and widths in both; finite, costs not negative.
        budget: in the unit of the costs.
        unit: of the budget, for the error message.

    Raises:
        UsageError: even the cheapest widths pass the budget; it names what they come to.
    """
    _check(scores, costs)
    least = sum(min(row.values()) for row in costs.values())
    if least > budget:
        message = (
            f"budget {_plain(budget, unit)} can't be kept: the least these widths can come to is "
            f"{_plain(least, unit)}; raise the budget or allow narrower widths with --bits"
        )
        raise UsageError(message)
    greedy = _greedy(scores, costs, budget)
    if method == "greedy":
        return greedy
    exact = _ilp(scores, costs, budget)
    # HiGHS stops within a tolerance, so on a tie of 1e-9 the heuristic may be the better one.
    if exact is None or total(scores, greedy) < total(scores, exact):
        return greedy
    return exact


def total(table: Table, chosen: Mapping[str, str]) -> float:
    """The sum of a table over the chosen widths."""
    return sum(table[layer][width] for layer, width in chosen.items())


def _check(scores: Table, costs: Table) -> None:
    if {k: set(v) for k, v in scores.items()} != {k: set(v) for k, v in costs.items()}:
        message = "scores and costs must have the same layers and widths"
        raise ValueError(message)
    for table in (scores, costs):
        if not all(np.isfinite(list(row.values())).all() for row in table.values()):
            message = "scores and costs must be finite"
            raise ValueError(message)


def _plain(value: float, unit: str) -> str:
    return f"{value:,.10g} {unit}".strip()


def _greedy(scores: Table, costs: Table, budget: float) -> dict[str, str]:
    chosen = {layer: next(iter(row)) for layer, row in scores.items()}
    while total(costs, chosen) > budget:
        best: tuple[float, str, str] | None = None
        for layer, now in chosen.items():
            for width, cost in costs[layer].items():
                saved = costs[layer][now] - cost
                if saved <= 0:
                    continue
                price = (scores[layer][width] - scores[layer][now]) / saved
                if best is None or price < best[0]:
                    best = (price, layer, width)
        assert best is not None  # the cheapest widths are within the budget
        chosen[best[1]] = best[2]
    return chosen


def _ilp(scores: Table, costs: Table, budget: float) -> dict[str, str] | None:
    """The exact answer, or None if the solver gives none that keeps the budget to the last bit."""
    keys = [(layer, width) for layer, row in scores.items() for width in row]
    score = np.array([scores[layer][width] for layer, width in keys])
    cost = np.array([costs[layer][width] for layer, width in keys], dtype=float)
    rows = {layer: index for index, layer in enumerate(scores)}
    pick = coo_array(
        (np.ones(len(keys)), ([rows[layer] for layer, _ in keys], np.arange(len(keys)))),
        shape=(len(rows), len(keys)),
    )
    # Both scaled to about 1, where the solver's absolute tolerances mean something.
    objective = score / (np.abs(score).max() or 1.0)
    scale = budget if budget > 0 else 1.0
    for attempt in range(_TRIES):
        limit = budget / scale * (1 - attempt * _MARGIN)
        found = milp(
            objective,
            integrality=np.ones(len(keys)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(pick.tocsr(), 1, 1),
                LinearConstraint(cost[None, :] / scale, -np.inf, limit),
            ],
            options={"mip_rel_gap": 0.0, "time_limit": 60.0},
        )
        if found.x is None:
            return None
        chosen = _chosen(keys, found.x)
        if total(costs, chosen) <= budget:
            return chosen
    return None


def _chosen(keys: Sequence[tuple[str, str]], values: np.ndarray) -> dict[str, str]:
    best: dict[str, tuple[float, str]] = {}
    for (layer, width), value in zip(keys, values, strict=True):
        if layer not in best or value > best[layer][0]:
            best[layer] = (float(value), width)
    return {layer: width for layer, (_, width) in best.items()}
