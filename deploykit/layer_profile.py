"""Profiles as the report keeps them, and a file's layers beside another's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploykit.targets.profiling.profile import FileProfile
from deploykit.types import LayerProfile, LayerTime

__all__ = ["UNMAPPED", "LayerCost", "layer_costs", "layer_profile"]

UNMAPPED = ""
"""The layer of kernels that no layer of the file can be found for."""


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs, with all that works for it.

    Attributes:
        name: the layer's; UNMAPPED for kernels of none.
        kernel, precision: of what takes most of its computing time; "" if nothing computes.
        parts: milliseconds by kind.
        rounds: milliseconds of all of it, in each round of the profile.
    """

    name: str
    kernel: str
    precision: str
    parts: Mapping[str, float]
    rounds: tuple[float, ...]

    @property
    def ms(self) -> float:
        """All of it; the layers of a file add up to its total."""
        return sum(self.parts.values())

    @property
    def is_integer(self) -> bool:
        return self.precision == "int8"


def layer_profile(artifact: str, file_format: str, target: str, found: FileProfile) -> LayerProfile:
    """A file's profile for the report: the median of the rounds, scaled to add up to the total."""
    medians = [statistics.median(kernel.ms) for kernel in found.kernels]
    total = statistics.median(found.total_ms)
    scale = total / (sum(medians) or 1.0)
    return LayerProfile(
        artifact=artifact,
        format=file_format,
        target=target,
        total_ms=total,
        layers=[
            LayerTime.model_validate(
                {
                    "layer": kernel.layer,
                    "kind": kernel.kind,
                    "kernel": kernel.name,
                    "op": kernel.op,
                    "precision": kernel.precision,
                    "ms": ms * scale,
                    "rounds_ms": [round(one, 6) for one in kernel.ms],
                    "share": ms * scale / total,
                }
            )
            for kernel, ms in zip(found.kernels, medians, strict=True)
        ],
    )


def layer_costs(profile: LayerProfile) -> dict[str, LayerCost]:
    """A profile's kernels summed by layer, in the order the layers first run."""
    groups: dict[str, list[LayerTime]] = {}
    for row in profile.layers:
        groups.setdefault(row.layer, []).append(row)
    return {name: _cost(name, rows) for name, rows in groups.items()}


def _cost(name: str, rows: Sequence[LayerTime]) -> LayerCost:
    parts: dict[str, float] = {}
    for row in rows:
        parts[row.kind] = parts.get(row.kind, 0.0) + row.ms
    computing = [row for row in rows if row.kind == "compute"]
    main = max(computing, key=lambda row: row.ms, default=None)
    rounds = [row.rounds_ms for row in rows if row.rounds_ms]
    return LayerCost(
        name=name,
        kernel=main.op if main else "",
        precision=main.precision if main else "",
        parts=parts,
        rounds=tuple(sum(times) for times in zip(*rounds, strict=True)),
    )
