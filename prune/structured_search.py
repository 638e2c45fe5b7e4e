"""Which widths to keep: most importance for a given cost.

For a price ``λ`` of cost, each group takes the width with the least ``importance lost + λ cost``,
its cost counted with all other groups at full width; ``λ`` is found by bisection on what the
widths together really cost. With a cost that is a plain count this is a threshold on importance
per cost; with measured times it jumps over widths that save nothing. What the coarse steps
overshoot is given back, best importance per cost first.

Why at full width: counted with the others as narrow as they have become, a layer costs less the
narrower its neighbours are, and the search would strip a few groups and spare the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from deploykit.prune.structured_cost import Cost, Floats
from deploykit.prune.structured_groups import Group

__all__ = ["Choice", "Fairness", "choose_widths", "options_of"]

Fairness = Literal["kind", "layer", "none"]
_BISECTIONS = 40


@dataclass(frozen=True)
class Choice:
    """The widths one group may have: units kept, falling, and the importance each loses."""

    kept: tuple[int, ...]
    lost: Floats
    units: int

    @property
    def shares(self) -> Floats:
        return np.array(self.kept) / self.units


def options_of(group: Group, scores: Tensor, round_to: int, most: float) -> Choice:
    """The widths that kernels like, from full down to the floor.

    Args:
        scores: float64 (units,), ascending: the least important units go first.
        round_to: widths (of one copy) are multiples of it, but for the full one.
        most: the largest share that may go.
    """
    step = group.step or round_to
    least = max(1, int(np.ceil(group.units * (1 - most) - 1e-9)))
    multiples = range(group.units // step * step, 0, -step)
    kept = tuple(dict.fromkeys([group.units, *(n for n in multiples if n >= least)]))
    sums = np.concatenate([[0.0], scores.double().numpy().cumsum()])
    return Choice(kept, sums[[group.units - n for n in kept]], group.units)


def choose_widths(
    choices: Sequence[Choice],
    kinds: Sequence[str],
    cost: Cost,
    target: float,
    fairness: Fairness,
) -> list[int]:
    """An option's index for each group, so that the cost is at most ``target``.

    Args:
        kinds: of the groups, for ``fairness``: importances are scaled so that all units of a
            kind (or layer) together are worth what they cost.

    Returns:
        Indices into each choice's ``kept``. If no widths reach the target, the narrowest.
    """
    losses = _normalised(choices, kinds, cost, fairness)
    full = np.ones(len(choices))
    alone = [cost.touched(group, full, choice.shares) for group, choice in enumerate(choices)]
    low, high = 0.0, _enough(choices, losses, alone, cost, target)
    best = _at_price(losses, alone, high)
    if cost.total(_shares(choices, best)) > target:
        return best
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = _at_price(losses, alone, middle)
        if cost.total(_shares(choices, found)) <= target:
            best, high = found, middle
        else:
            low = middle
    return _given_back(choices, losses, cost, target, best)


def _shares(choices: Sequence[Choice], picked: Sequence[int]) -> Floats:
    return np.array([c.kept[i] / c.units for c, i in zip(choices, picked, strict=True)])


def _normalised(
    choices: Sequence[Choice], kinds: Sequence[str], cost: Cost, fairness: Fairness
) -> list[Floats]:
    """Losses, scaled so that price 1 is about the mean importance per cost."""
    full = np.ones(len(choices))
    costs, totals = [], []
    for group, choice in enumerate(choices):
        ends = cost.touched(group, full, np.array([0.0, 1.0]))
        costs.append(max(float(ends[1] - ends[0]), 0.0))
        # The importance of all units, from the share of them that may go.
        gone = 1 - choice.shares[-1]
        totals.append(float(choice.lost[-1]) / gone if gone > 0 else 0.0)
    names = {
        "kind": list(kinds),
        "layer": [str(index) for index in range(len(choices))],
        "none": ["" for _ in choices],
    }[fairness]
    scale = {}
    for name in set(names):
        mine = [i for i, other in enumerate(names) if other == name]
        worth = sum(totals[i] for i in mine)
        scale[name] = sum(costs[i] for i in mine) / worth if worth > 0 else 0.0
    return [choice.lost * scale[name] for choice, name in zip(choices, names, strict=True)]


def _enough(
    choices: Sequence[Choice],
    losses: Sequence[Floats],
    alone: Sequence[Floats],
    cost: Cost,
    target: float,
) -> float:
    """A price at which the target is met, or one so high that nothing more would go."""
    price = 1.0
    for _ in range(40):
        if cost.total(_shares(choices, _at_price(losses, alone, price))) <= target:
            return price
        price *= 4
    return price


def _at_price(losses: Sequence[Floats], alone: Sequence[Floats], price: float) -> list[int]:
    """Each group's best option; ties keep the wider."""
    return [int((loss + price * own).argmin()) for loss, own in zip(losses, alone, strict=True)]


def _given_back(
    choices: Sequence[Choice],
    losses: Sequence[Floats],
    cost: Cost,
    target: float,
    picked: list[int],
) -> list[int]:
    """Widen groups one step at a time while the cost stays within the target."""
    picked = list(picked)
    shares = _shares(choices, picked)
    room = target - cost.total(shares)
    while True:
        best, chosen, spent = 0.0, -1, 0.0
        for group, choice in enumerate(choices):
            if picked[group] == 0:
                continue
            pair = choice.shares[[picked[group], picked[group] - 1]]
            now, then = cost.touched(group, shares, pair)
            gain = losses[group][picked[group]] - losses[group][picked[group] - 1]
            worth = gain / max(then - now, 1e-12)
            if then - now <= room and worth > best:
                best, chosen, spent = worth, group, then - now
        if chosen < 0:
            return picked
        picked[chosen] -= 1
        shares[chosen] = choices[chosen].shares[picked[chosen]]
        room -= spent
