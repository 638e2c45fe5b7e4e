"""The per-layer view in the report: what each file's time goes into, beside the original's."""

from __future__ import annotations

from dataclasses import dataclass

from deploykit.layer_profile import UNMAPPED, LayerCost, layer_costs
from deploykit.layer_verdict import verdict_lines
from deploykit.report import wording
from deploykit.report.model import Report
from deploykit.types import LayerProfile

__all__ = ["LayerRow", "LayerTable", "layer_tables"]

_NO_LAYER = "kernels of no known layer"


@dataclass(frozen=True)
class LayerRow:
    """One layer, as texts: milliseconds but for the first three and the last."""

    layer: str
    kernel: str
    precision: str
    ms: str
    quantise: str
    reformat: str
    float_ms: str
    times: str


@dataclass(frozen=True)
class LayerTable:
    """The costliest layers of a file on a target, and what the profiles say."""

    artifact: str
    target: str
    rows: list[LayerRow]
    left_out: int
    verdict: list[str]


def layer_tables(report: Report, most: int = 15) -> list[LayerTable]:
    """A table for every file but the original, on every target it was profiled on."""
    originals = {p.target: p for p in report.layer_times if p.artifact == "original"}
    before = list(report.recipe.get("quantize", {}).get("float_layers") or [])
    return [
        _table(profile, originals.get(profile.target), before, most)
        for profile in report.layer_times
        if profile.artifact != "original"
    ]


def _table(
    profile: LayerProfile, original: LayerProfile | None, before: list[str], most: int
) -> LayerTable:
    costs = sorted(layer_costs(profile).values(), key=lambda cost: -cost.ms)
    beside = layer_costs(original) if original else {}
    return LayerTable(
        artifact=wording.clean(profile.artifact),
        target=wording.clean(profile.target),
        rows=[_row(cost, beside.get(cost.name)) for cost in costs[:most]],
        left_out=len(costs[most:]),
        verdict=verdict_lines(original, profile, before) if original else [],
    )


def _row(cost: LayerCost, before: LayerCost | None) -> LayerRow:
    known = before is not None and before.ms > 0
    return LayerRow(
        layer=_NO_LAYER if cost.name == UNMAPPED else wording.clean(cost.name),
        kernel=wording.clean(cost.kernel),
        precision=wording.clean(cost.precision),
        ms=wording.ms(cost.ms),
        quantise=_some(cost.parts.get("quantise")),
        reformat=_some(cost.parts.get("reformat")),
        float_ms=wording.ms(before.ms) if before is not None else "–",
        times=f"{cost.ms / before.ms:.2f}" if known and before is not None else "–",
    )


def _some(value: float | None) -> str:
    return wording.ms(value) if value else "–"
