"""LiteRT models (``.tflite``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploykit.export.archive import archived, removed_on_error
from deploykit.export.plain_lowering import Lowered, lower_plainly
from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.export.target_reader import read_by
from deploykit.targets.environments import missing
from deploykit.targets.host import call

__all__ = ["LitertExporter"]

_EXPORT_SECONDS = 3600.0


@register_exporter("litert")
class LitertExporter:
    """Models for one image at a time, made and read in LiteRT's own environment."""

    name: str
    suffix: str = ".tflite"
    profile: Profile = "asymmetric"

    def available(self) -> str | None:
        """None, or that the environment is not there and the command that makes it."""
        return missing("litert")

    def export(self, source: Source, path: Path) -> Exported:
        """Write the model at ``path``.

        Raises:
            TargetMissingError: LiteRT's environment is not there.
            DeploykitError: LiteRT can't convert the graph or run what came of it.
        """
        lowered = lower_plainly(source.graph_module, codes_in_graph=False)
        with removed_on_error(path), archived(lowered.graph_module, source.backbone) as program:
            codes = program.with_name("codes.npz")
            arrays = {}
            for index, weight in enumerate(lowered.codes):
                arrays[f"codes{index}"] = weight.codes.numpy()
                arrays[f"scale{index}"] = weight.scale.numpy()
            np.savez(codes, allow_pickle=False, **arrays)
            layers = call(
                "litert",
                "deploykit.export.workers.litert:write",
                _EXPORT_SECONDS,
                program=str(program),
                path=str(path.absolute()),
                codes=str(codes),
                kinds=[(one.bits, one.kind, one.keeps_grid) for one in lowered.codes],
            )
        return Exported(
            precision=source.precision,
            dynamic_batch=False,
            notes=_notes(lowered, layers),
            layers=layers,
        )

    def reader(self, path: Path) -> tuple[str, Reader] | None:
        """The model run by LiteRT on this machine."""
        return read_by("mobile-litert", path)


def _notes(lowered: Lowered, layers: dict[str, int]) -> tuple[str, ...]:
    notes = ["takes one image at a time"]
    dynamic = sum(count for kind, count in layers.items() if kind.endswith("dynamic"))
    if dynamic:
        notes.append(
            f"{dynamic} layers without an output grid choose their input's grid when they run "
            "(8 bits, row by row): LiteRT's fixed-grid layers must write integers"
        )
    stored = layers.get("float with int8 weights", 0)
    if stored:
        notes.append(f"weights of {stored} layers are 8 bit in the file and floats when computed")
    lost = len(lowered.codes) - sum(layers.values()) + layers.get("float", 0)
    if lost > 0 and lowered.codes:
        notes.append(f"{lost} weights were rearranged by the converter and stay floats")
    return tuple(notes)
