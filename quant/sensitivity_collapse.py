"""Layers that should not be quantised like the others, named from their scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from deploykit.quant.sensitivity import FLOAT_BITS, LayerScores

__all__ = ["CollapsedLayer", "find_collapse"]

SQNR_FLOOR_DB = 10.0  # a tenth of the output's energy is noise
NOISY_DB = 20.0  # a hundredth; a layer above it is no collapse, however large its share of little
SHARE = 0.25  # of the sum of all layers' scores …
TIMES_MEDIAN = 10.0  # … and this many times the score in the middle: in a small network
# every layer has a large share


@dataclass(frozen=True)
class CollapsedLayer:
    """One layer far worse than the rest at some bits.

    Attributes:
        share: of the sum of the scores at these bits.
        reason: in words.
        keep: the narrowest wider bits at which it does not collapse, or ``float``.
    """

    layer: str
    bits: str
    score: float
    share: float
    sqnr_db: float
    reason: str
    keep: str


def find_collapse(layers: Sequence[LayerScores], bits: str) -> list[CollapsedLayer]:
    """The layers that collapse at some bits, worst first.

    One collapses if its own output has an SQNR below 10 dB, or below 20 dB while it makes more
    than a quarter of all loss and ten times that of the middle layer.
    """
    found = []
    for row in layers:
        reason = _reason(layers, row, bits)
        if reason is None:
            continue
        wider = list(row.scores)[: list(row.scores).index(bits)]
        keep = next((b for b in reversed(wider) if _reason(layers, row, b) is None), FLOAT_BITS)
        total = _total(layers, bits)
        share = row.scores[bits] / total if total > 0 else 0.0
        found.append(
            CollapsedLayer(
                row.layer, bits, row.scores[bits], share, row.sqnr_db[bits], reason, keep
            )
        )
    return sorted(found, key=lambda one: (-one.score, one.sqnr_db))


def _total(layers: Sequence[LayerScores], bits: str) -> float:
    return sum(row.scores.get(bits, 0.0) for row in layers)


def _reason(layers: Sequence[LayerScores], row: LayerScores, bits: str) -> str | None:
    if bits not in row.scores or bits == FLOAT_BITS:
        return None
    reasons = []
    if row.sqnr_db[bits] < SQNR_FLOOR_DB:
        reasons.append(f"its output's SQNR is {row.sqnr_db[bits]:.1f} dB")
    score = row.scores[bits]
    middle = statistics.median(other.scores[bits] for other in layers if bits in other.scores)
    dominates = score > SHARE * _total(layers, bits) and score > TIMES_MEDIAN * middle
    if dominates and row.sqnr_db[bits] < NOISY_DB:
        reasons.append(f"it makes {score / _total(layers, bits):.0%} of all layers' loss")
    return " and ".join(reasons) or None
