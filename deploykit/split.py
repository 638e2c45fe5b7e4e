"""One model split by classes into several, each for a device of its own (ED-ViT).

X. Liu et al., "ED-ViT: Splitting Vision Transformer for Distributed Inference on Edge Devices",
2024. Every part is an ordinary run of the recipe with some of the classes: pruned by what these
classes need, recovered, quantised, exported, verified. Together they answer for all classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from deploykit.artifacts import ArtifactWriter, chosen_exporters, chosen_targets, loadable
from deploykit.backbones.build import build_backbone
from deploykit.data import ImageSet
from deploykit.environment import version
from deploykit.errors import ExitCode, UsageError
from deploykit.evaluate import paired_accuracy, top1_and_predictions
from deploykit.export.parity import in_batches
from deploykit.export.registry import Reader
from deploykit.export.target_reader import loaded
from deploykit.fsio import atomic_write_text, remove
from deploykit.fusion import Fusion, fit_fusion
from deploykit.graph.capture import capture
from deploykit.images import calibration_images, labelled_images
from deploykit.inputs import Inputs
from deploykit.pipeline import run
from deploykit.progress import Reporter
from deploykit.recipe import Recipe
from deploykit.recipe_io import dump_recipe
from deploykit.report.model import Report, load_report
from deploykit.report.split_model import PartRow, SplitReport
from deploykit.report.split_page import render_page
from deploykit.targets.device import allowed_cores
from deploykit.targets.registry import Target
from deploykit.types import Accuracy, Artifact, Backbone
from deploykit.verify import measure_latency
from deploykit.workspace import open_workspace, output_folder

__all__ = ["default_output", "read_classes", "run_split", "share_out"]

_FIT_IMAGES = 512
_MAX_BYTES = 16_000_000


def default_output(recipe: Recipe, parts: int) -> Path:
    """``out/<model>-split<parts>`` in the working folder."""
    return output_folder(recipe.model.name, f"split{parts}")


def share_out(count: int, parts: int) -> list[list[int]]:
    """Classes 0 to ``count - 1`` in ``parts`` runs of neighbours, as even as they go.

    Raises:
        UsageError: fewer than two parts, or parts of fewer than two classes.
    """
    if parts < 2 or count < 2 * parts:
        message = f"wanted 2 to {count // 2} parts of {count} classes, got {parts}"
        raise UsageError(message)
    return [part.tolist() for part in torch.arange(count).tensor_split(parts)]


def read_classes(path: Path) -> list[list[int]]:
    """``[[0, 3, 5], [1, 2, 4]]`` from a JSON file.

    Raises:
        UsageError: the file can't be read or holds something else.
    """
    wanted = "wanted lists of class numbers such as [[0, 3], [1, 2]]"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path}: {wanted}, got a file above 16 MB")
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UsageError(f"{path}: {wanted}; {reason}") from error
    good = isinstance(data, list) and all(
        isinstance(part, list) and part and all(type(c) is int for c in part) for part in data
    )
    if not good:
        raise UsageError(f"{path}: {wanted}")
    return [list(part) for part in data]


def run_split(
    recipe: Recipe,
    out: Path,
    classes: Sequence[Sequence[int]] | int,
    *,
    command: str,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
) -> SplitReport:
    """Carry out the recipe once for every part, and judge the parts together.

    Args:
        classes: of each part, or a number of parts.

    Writes ``part-1`` …, each a run's output folder, ``original.*``, split.json and split.html.

    Raises:
        UsageError: bad input; the parts don't hold every class once.
        DeploykitError: a part could not be made.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    if recipe.model.classes is not None or recipe.quantize.compare:
        raise UsageError("a split model takes neither model.classes nor quantize.compare")
    if recipe.model.gives_features:
        raise UsageError("a split model shares out classes, which model.features has none of")
    targets = chosen_targets(recipe.targets[:1])
    exporter = chosen_exporters(recipe, targets)[0]
    backbone, notes = build_backbone(recipe.model, recipe.seed)
    parts = _parts(classes, backbone.num_classes)
    inputs = Inputs(recipe, backbone)
    for note in notes:
        reporter.note(note)
    text = f"# parts: {json.dumps(parts)}\n{dump_recipe(recipe)}"
    workspace = open_workspace(out, text, version(), resume=resume, overwrite=overwrite)
    try:
        if overwrite and not resume:
            for old in out.glob("part-*"):
                remove(old)
        reports = []
        for number, part in enumerate(parts, start=1):
            reporter.note(f"part {number} of {len(parts)}: {len(part)} classes")
            reports.append(_part(recipe, part, out / f"part-{number}", command, reporter, resume))
        writer = ArtifactWriter(
            workspace, reporter, backbone, {"model": backbone.name}, recipe.batches
        )
        original = writer.write(exporter, "original", capture(backbone), "fp32")
        files = [
            _shipped(report, targets[0], out / f"part-{number}", f"part-{number}")
            for number, report in enumerate(reports, start=1)
        ]
        group = _Group(recipe, targets[0], original, files, parts)
        with reporter.step("fit the ensemble's scales"):
            fusion, fitted_on = group.fit(backbone)
        accuracy = None
        if inputs.evaluation is not None:
            with reporter.step("accuracy of the ensemble"):
                accuracy = group.accuracy(fusion, inputs.evaluation)
        measured = measure_latency(
            recipe, workspace, reporter, backbone, [original, *files], targets
        )
        timed = {m.artifact: m for m in measured}
        limit = recipe.gates.max_drop
        report = SplitReport(
            deploykit_version=version(),
            command=command,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 1),
            model=backbone.name,
            weights=backbone.weights,
            bits=reports[0].bits,
            target=targets[0].name,
            fitted_on=fitted_on,
            original=original,
            original_measurement=timed.get("original"),
            parts=[
                PartRow(
                    name=file.name,
                    classes=list(part),
                    report=out / file.name / "report.html",
                    artifact=file,
                    scale=scale,
                    offset=offset,
                    accuracy=own.find_accuracy("compressed"),
                    measurement=timed.get(file.name),
                )
                for file, part, own, scale, offset in zip(
                    files, parts, reports, fusion.scales, fusion.offsets, strict=True
                )
            ],
            accuracy=accuracy,
            max_drop=limit,
            warnings=[*notes, *inputs.notes],
            exit_code=_exit_code(reports, accuracy, limit, backbone),
        )
        workspace.write(out / "split.json", report.to_json().encode())
        atomic_write_text(out / "split.html", render_page(report))
        workspace.write(out / "recipe.yaml", text.encode())
    except UsageError:
        workspace.discard()
        raise
    workspace.finish()
    return report


def _parts(classes: Sequence[Sequence[int]] | int, count: int) -> list[list[int]]:
    if isinstance(classes, int):
        return share_out(count, classes)
    parts = [list(part) for part in classes]
    if sorted(c for part in parts for c in part) != list(range(count)) or len(parts) < 2:
        message = f"wanted two or more parts that hold each class from 0 to {count - 1} once"
        raise UsageError(message)
    return parts


def _part(
    recipe: Recipe, classes: list[int], out: Path, command: str, reporter: Reporter, resume: bool
) -> Report:
    """A part's own run; one that a resumed split finds finished isn't run again."""
    if resume and (out / "report.json").is_file() and not (out / ".work").exists():
        return load_report(out)
    model = recipe.model.model_copy(update={"classes": classes})
    gates = recipe.gates.model_copy(update={"max_drop": None})  # it is the ensemble's
    own = recipe.model_copy(update={"model": model, "gates": gates})
    return run(
        own,
        out,
        command=command,
        reporter=reporter,
        resume=resume and (out / ".work").exists(),
    )


def _shipped(report: Report, target: Target, folder: Path, name: str) -> Artifact:
    """A part's compressed file for the target, by the part's name."""
    own = [a for a in report.artifacts if a.name == "compressed"]
    found = loadable(own, target)[0]
    return found.model_copy(update={"name": name, "path": folder / found.path.name})


def _exit_code(
    reports: Sequence[Report], accuracy: Accuracy | None, limit: float | None, backbone: Backbone
) -> int:
    bad = [r.exit_code for r in reports if r.exit_code not in (ExitCode.OK, ExitCode.UNTRAINED)]
    if bad:
        return bad[0]
    if accuracy is not None and limit is not None and accuracy.drop > limit:
        return ExitCode.ACCURACY
    return ExitCode.UNTRAINED if backbone.weights.kind == "untrained" else ExitCode.OK


class _Group:
    """The files of a split model, run together."""

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        original: Artifact,
        files: Sequence[Artifact],
        parts: Sequence[Sequence[int]],
    ) -> None:
        threads = len(allowed_cores())
        self.recipe, self.parts = recipe, parts
        dynamic = all(file.dynamic_batch for file in (original, *files))
        self.batch = recipe.evaluation.batch_size if dynamic else 1
        self.original = loaded(target, original.path, threads)
        self.runs = [loaded(target, file.path, threads) for file in files]

    def fit(self, backbone: Backbone) -> tuple[Fusion, str]:
        """Scales and offsets from the calibration folder, by its labels where it has any."""
        images, labels, source = self._fit_images(backbone)
        wanted = self._batched(self.original, images).argmax(1) if labels is None else labels
        logits = [self._batched(run, images) for run in self.runs]
        return fit_fusion(self.parts, logits, wanted), source

    def accuracy(self, fusion: Fusion, images: ImageSet) -> Accuracy:
        """Top-1 of the ensemble, paired with the original's."""
        assert images.labels is not None

        def ensemble(batch: Tensor) -> Tensor:
            return fusion([run(batch) for run in self.runs])

        before = top1_and_predictions(self.original, images, self.batch)
        after = top1_and_predictions(ensemble, images, self.batch)
        return paired_accuracy("ensemble", images.labels, before, after, images.description)

    def _fit_images(self, backbone: Backbone) -> tuple[Tensor, Tensor | None, str]:
        folder, seed = self.recipe.calibration.data, self.recipe.seed
        found = None
        if folder is not None:
            found = labelled_images(
                folder, backbone.preprocessing, backbone.num_classes, limit=_FIT_IMAGES, seed=seed
            )
        if found is not None:
            pixels = torch.cat([batch for batch, _ in found.tensor_batches(self.batch)])
            return pixels, found.labels, f"{found.description}, by their labels"
        pool = calibration_images(folder, backbone, _FIT_IMAGES, seed)
        pixels = torch.cat(list(pool.batches(self.batch)))
        return pixels, None, f"{pool.description}, by the original's answers"

    def _batched(self, run: Reader, images: Tensor) -> Tensor:
        return in_batches(run, images, self.batch)
