"""Which layers are better left in float on a target, judged from two profiles.

All of it is arithmetic on tables: the same profiles give the same answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deploykit.layer_profile import UNMAPPED, LayerCost

__all__ = ["Comparison", "LayerDelta", "choose_float", "compare_layers"]


@dataclass(frozen=True)
class LayerDelta:
    """A layer in the quantised file beside itself in the float file.

    Attributes:
        float_ms, quantised_ms: with all that works for it: norms before it, Q/DQ, reorders.
        low, high: of the difference (quantised - float) over the rounds, milliseconds.
        precision: what its main kernel computed with in the quantised file.
        quantise_ms, reformat_ms: the Q/DQ and the moved or reordered values in it; of reformatting
            what the quantised file has more than the float one.
    """

    name: str
    float_ms: float
    quantised_ms: float
    low: float
    high: float
    precision: str
    quantise_ms: float
    reformat_ms: float

    @property
    def delta(self) -> float:
        """Milliseconds that quantising the layer costs; negative where it gains."""
        return self.quantised_ms - self.float_ms

    @property
    def slower(self) -> bool:
        """Slower than in float, by more than the rounds differ among themselves."""
        return self.low > 0 and self.delta > 0

    @property
    def faster(self) -> bool:
        """Faster than in float, by more than the rounds differ among themselves."""
        return self.high < 0 and self.delta < 0


@dataclass(frozen=True)
class Comparison:
    """Two files of one model on one target.

    Attributes:
        layers: what both have, in the quantised file's order.
        float_rest_ms, quantised_rest_ms: of all else: kernels of no known layer, and layers that
            only one of the files has.
    """

    layers: tuple[LayerDelta, ...]
    float_rest_ms: float
    quantised_rest_ms: float

    @property
    def float_ms(self) -> float:
        return sum(layer.float_ms for layer in self.layers) + self.float_rest_ms

    @property
    def quantised_ms(self) -> float:
        return sum(layer.quantised_ms for layer in self.layers) + self.quantised_rest_ms

    @property
    def slower(self) -> list[LayerDelta]:
        """Layers that are slower than in float beyond the noise, the costliest first."""
        found = [layer for layer in self.layers if layer.slower]
        return sorted(found, key=lambda layer: -layer.delta)

    def predicted(self, floats: Collection[str]) -> float:
        """Milliseconds of the file with these layers in float, if each costs what it did.

        With every layer in float it is the float file. What a float layer costs between integer
        neighbours is not in it: that has to be measured.
        """
        names = {layer.name for layer in self.layers}
        if names <= set(floats):
            return self.float_ms
        times = (
            layer.float_ms if layer.name in floats else layer.quantised_ms for layer in self.layers
        )
        return sum(times) + self.quantised_rest_ms


def compare_layers(
    floats: Mapping[str, LayerCost],
    quantised: Mapping[str, LayerCost],
    only: Collection[str] | None = None,
) -> Comparison:
    """Two files' layers side by side. Rounds are compared in pairs: they were taken in turns.

    Args:
        only: layers that can be placed; all else is the rest.
    """
    both = [name for name in quantised if name in floats and name != UNMAPPED]
    if only is not None:
        both = [name for name in both if name in only]
    return Comparison(
        layers=tuple(_delta(floats[name], quantised[name]) for name in both),
        float_rest_ms=sum(cost.ms for name, cost in floats.items() if name not in both),
        quantised_rest_ms=sum(cost.ms for name, cost in quantised.items() if name not in both),
    )


def _delta(before: LayerCost, after: LayerCost) -> LayerDelta:
    differences = [b - a for a, b in zip(before.rounds, after.rounds, strict=False)]
    delta = after.ms - before.ms
    # Medians are scaled to the file's median, rounds to their own: move the rounds along.
    shift = delta - statistics.median(differences) if differences else 0.0
    reformat = after.parts.get("reformat", 0.0) - before.parts.get("reformat", 0.0)
    return LayerDelta(
        name=after.name,
        float_ms=before.ms,
        quantised_ms=after.ms,
        low=min(differences, default=delta) + shift,
        high=max(differences, default=delta) + shift,
        precision=after.precision,
        quantise_ms=after.parts.get("quantise", 0.0),
        reformat_ms=max(reformat, 0.0),
    )


def choose_float(comparison: Comparison, already: Collection[str] = ()) -> frozenset[str]:
    """Layers to leave in float; never predicted slower than the float file.

    First those that are slower beyond the noise. If the rest still wouldn't beat the float file,
    all that look slower. If that doesn't either: every layer.

    Args:
        already: layers that are in float in the quantised file; they stay so.
    """
    every = frozenset(layer.name for layer in comparison.layers)
    goal = comparison.float_ms
    sure = frozenset(layer.name for layer in comparison.slower) | (every & frozenset(already))
    if comparison.predicted(sure) < goal:
        return sure
    likely = sure | {layer.name for layer in comparison.layers if layer.delta > 0}
    return likely if comparison.predicted(likely) < goal else every
