"""The graph itself, as torch runs it: a folder (``.torch``) of JSON and safetensors."""

from __future__ import annotations

from pathlib import Path

from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.export.structure import save_model
from deploykit.export.target_reader import read_by

__all__ = ["TorchExporter"]


@register_exporter("torch")
class TorchExporter:
    """``structure.json`` and ``model.safetensors``; codes of a quantised graph run as floats."""

    name: str
    suffix: str = ".torch"
    profile: Profile = "asymmetric"
    levels: bool = True

    def available(self) -> str | None:
        """None: it needs nothing that may be missing."""
        return None

    def export(self, source: Source, path: Path) -> Exported:
        """See ``Exporter.export``.

        Raises:
            DeploykitError: the graph holds an operator that is not in the format's list.
        """
        path.mkdir()
        save_model(
            source.graph_module,
            source.backbone,
            path,
            precision=source.precision,
            dynamic_batch=source.dynamic_batch,
        )
        quantised = source.precision != "fp32"
        notes = ("quantised parts are simulated in floats: the speed is not an integer kernel's",)
        return Exported(
            source.precision,
            source.dynamic_batch,
            notes if quantised else (),
            simulated=quantised,
        )

    def reader(self, path: Path) -> tuple[str, Reader] | None:
        """The graph run by torch."""
        return read_by("cpu-torch", path)
