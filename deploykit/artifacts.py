"""The files of a run: graphs lowered to the formats that its targets load."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import TargetMissingError, UsageError
from deploykit.export.registry import Exporter, Source, get_exporter, holds_levels, list_exporters
from deploykit.fsio import writing
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import QuantizedModel
from deploykit.progress import Reporter
from deploykit.recipe import Recipe
from deploykit.targets.registry import Target, get_target
from deploykit.types import STAGES, Artifact, Backbone
from deploykit.workspace import Workspace

__all__ = ["ArtifactWriter", "chosen_exporters", "chosen_targets", "loadable", "size_and_hash"]

_STEMS = {name: name for name in ("original", *STAGES)} | {"compressed": "model"}


def chosen_targets(names: Iterable[str]) -> list[Target]:
    """The targets of these names, all usable here.

    Raises:
        UsageError: there is no target of a name.
        TargetMissingError: a target's runtime or device isn't there.
    """
    targets = [get_target(name) for name in names]
    for target in targets:
        if (reason := target.available()) is not None:
            raise TargetMissingError(f"target {target.name}: {reason}")
    return targets


def chosen_exporters(recipe: Recipe, targets: Iterable[Target]) -> list[Exporter]:
    """What the targets want to load, then the formats that the recipe names beside.

    Raises:
        UsageError: there is no format of a name, or NNCF's file can't be had in it.
        TargetMissingError: a format's library isn't installed, or feature maps can't be had in it.
    """
    names = dict.fromkeys([*(target.exporter for target in targets), *recipe.export.formats])
    if recipe.quantize.algorithm == "nncf":
        if recipe.export.formats not in ([], ["onnx"]):
            message = "quantize.algorithm nncf gives ONNX files; leave export.formats out"
            raise UsageError(message)
        names = {"onnx": None}
    exporters = [get_exporter(name) for name in names]
    for exporter in exporters:
        if (reason := exporter.available()) is not None:
            raise TargetMissingError(f"format {exporter.name}: {reason}")
        if recipe.model.gives_features and not holds_levels(exporter):
            able = ", ".join(name for name in list_exporters() if _holds_levels(name))
            message = f"format {exporter.name} isn't written with feature maps yet"
            raise TargetMissingError(f"{message}; formats that are: {able}")
    return exporters


def _holds_levels(name: str) -> bool:
    try:
        return holds_levels(get_exporter(name))
    except ImportError:  # another package's, whose library isn't there
        return False


def loadable(artifacts: Iterable[Artifact], target: Target) -> list[Artifact]:
    """One file of each name that a target can load, in the format it prefers where there is one."""
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        preferred = artifact.format == target.exporter
        if artifact.path.suffix.lstrip(".") in target.formats and (
            preferred or artifact.name not in found
        ):
            found[artifact.name] = artifact
    return list(found.values())


@dataclass(frozen=True)
class ArtifactWriter:
    """Writes a run's files into its output folder, each whole or not at all.

    Attributes:
        batches: see ``Source``.
    """

    workspace: Workspace
    reporter: Reporter
    backbone: Backbone
    metadata: Mapping[str, str]
    batches: tuple[int, int] = Source.batches

    def write(
        self,
        exporter: Exporter,
        name: str,
        model: CapturedModel | QuantizedModel,
        precision: str,
        **facts: Any,
    ) -> Artifact:
        """Lower a graph to a format.

        Args:
            name: ``original``, one of ``STAGES``, or ``compressed``.
            facts: further fields of the artefact.
        """
        path = self.workspace.out / f"{_STEMS[name]}{exporter.suffix}"

        def make() -> dict[str, Any]:
            source = Source(
                model.graph_module,
                self.backbone,
                precision,
                dynamic_batch=model.dynamic_batch,
                metadata=self.metadata,
                batches=self.batches,
            )
            with self.reporter.step(f"write {path.name}"):
                folder = self.workspace.fresh_folder(f"export-{exporter.name}-{name}")
                with writing(path):
                    made = exporter.export(source, folder / path.name)
                    files = self.workspace.adopt(folder)
            return {
                "precision": made.precision,
                "dynamic_batch": made.dynamic_batch,
                "half": made.half,
                "notes": list(made.notes),
                "layers": dict(made.layers),
                **(_as_simulation(facts) if made.simulated else {}),
                **size_and_hash(f for f in files if f.name not in made.companions),
            }

        kept = self.workspace.cached(f"artifact-{exporter.name}-{name}", make)
        return self.artifact(exporter.name, name, path, **{**facts, **kept})

    def artifact(self, file_format: str, name: str, path: Path, **facts: Any) -> Artifact:
        """An artefact of this run."""
        weights = self.backbone.weights.label
        return Artifact(name=name, format=file_format, path=path, weights=weights, **facts)


def _as_simulation(facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """How a graph runs where nothing in it is an integer: all of it simulated."""
    parts = [part for how in ("integer", "wider", "simulated") for part in facts.get(how, [])]
    return {"integer": [], "wider": [], "simulated": parts}


def size_and_hash(paths: Iterable[Path]) -> dict[str, object]:
    """Bytes and sha256 of a file, or of all files of a format that needs several.

    The hash of several is that of their own, in the form that ``sha256sum`` prints.
    """
    files = sorted(
        file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file()
    )  # fmt: skip
    hashes = []
    for file in files:
        with file.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    size = sum(file.stat().st_size for file in files)
    if len(files) == 1:
        return {"bytes": size, "sha256": hashes[0]}
    lines = "".join(f"{h}  {file.name}\n" for h, file in zip(hashes, files, strict=True))
    return {"bytes": size, "sha256": hashlib.sha256(lines.encode()).hexdigest()}
