"""Parity of a finished run's files once more: on this machine, with its runtimes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from deploykit.artifacts import chosen_targets, loadable, size_and_hash
from deploykit.errors import UsageError
from deploykit.export.parity import affordable_images, compare_levels, in_batches, make_reference
from deploykit.export.registry import get_exporter
from deploykit.export.structure import STRUCTURE_NAME, load_model
from deploykit.export.target_reader import loaded
from deploykit.graph.edit import makes_choices
from deploykit.graph.quantized import has_activation_quantizers
from deploykit.images import calibration_images
from deploykit.report.model import load_report
from deploykit.targets.device import allowed_cores
from deploykit.targets.registry import Target, get_target, list_targets
from deploykit.types import Artifact, ParityRow

__all__ = ["artifact_here", "verify_folder"]

_BATCHES = (1, 8)


def verify_folder(
    folder: Path,
    targets: Sequence[str] | None = None,
    data: Path | None = None,
    images: int = 32,
    seed: int = 0,
) -> list[ParityRow]:
    """Compare the compressed files in a run's output folder with the graph saved beside them.

    The folder may come from another machine: a Core ML package made on Linux is checked by
    running this on a Mac. Only files that load what the saved graph was lowered to (the profile
    of the run's first target) can be compared.

    Args:
        targets: names; None takes every target here that loads one of the files.
        data: a folder of images; None takes synthetic ones.

    Raises:
        UsageError: the folder isn't a finished run's, a file isn't the one in the report, or
            none of the targets loads any.
        TargetMissingError: a target that was named isn't usable here.
    """
    report = load_report(folder)
    saved = load_model(folder / STRUCTURE_NAME)
    count = affordable_images(images, saved.backbone.levels)
    pool = calibration_images(data, saved.backbone, count, seed)
    pixels = torch.cat(list(pool.batches(pool.count)))
    artifacts = [artifact_here(artifact, folder) for artifact in report.artifacts]
    profile = get_exporter(report.compressed.format).profile
    ours = [
        a for a in artifacts if a.name == "compressed" and get_exporter(a.format).profile == profile
    ]
    floats = None
    graph_module = saved.graph_module
    if has_activation_quantizers(graph_module) or makes_choices(graph_module):
        floats = _original(artifacts)(pixels)
    batch = _BATCHES[1] if saved.dynamic_batch else 1
    reference = make_reference(
        "simulation (torch)", lambda x: in_batches(saved.graph_module, x, batch), pixels, floats,
        seed, saved.graph_module, saved.backbone.levels,
    )  # fmt: skip
    rows = []
    for target in _usable(targets, ours):
        for artifact in loadable(ours, target):
            run = loaded(target, artifact.path, len(allowed_cores()))
            for size in _BATCHES if artifact.dynamic_batch else (1,):
                logits = in_batches(run, pixels, size)
                rows += compare_levels(
                    artifact, target.name, size, logits, reference, pool.description
                )
    if not rows:
        formats = ", ".join(sorted({artifact.format for artifact in ours}))
        message = f"{folder}: no target here loads its files ({formats}); see deploykit doctor"
        raise UsageError(message)
    return rows


def artifact_here(artifact: Artifact, folder: Path) -> Artifact:
    """The artefact where the folder is now, if it is still the one that the report is about.

    Raises:
        UsageError: it isn't there, or it was changed.
    """
    path = folder / artifact.path.name
    if not path.exists():
        message = f"{path}: the report speaks of it, but it isn't there"
        raise UsageError(message)
    beside = [path.with_suffix(".bin")] if artifact.format == "openvino" else []
    if size_and_hash([path, *beside])["sha256"] != artifact.sha256:
        message = f"{path}: not the file that the report is about: its sha256 differs"
        raise UsageError(message)
    return artifact.model_copy(update={"path": path})


def _usable(names: Sequence[str] | None, artifacts: Sequence[Artifact]) -> list[Target]:
    if names is not None:
        return chosen_targets(names)
    return [
        target
        for target in map(get_target, list_targets())
        if loadable(artifacts, target) and target.available() is None
    ]


def _original(artifacts: Sequence[Artifact]) -> Callable[[Tensor], Tensor]:
    """The float file on the first target here that loads one."""
    originals = [artifact for artifact in artifacts if artifact.name == "original"]
    for target in _usable(None, originals):
        for artifact in loadable(originals, target):
            return loaded(target, artifact.path, len(allowed_cores()))
    message = "no target here loads the original's file, which the noise is measured against"
    raise UsageError(message)
