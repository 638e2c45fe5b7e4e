"""The one flow: backbone, captured graph, quantised graph, files, verified, measured, reported."""

from __future__ import annotations

import copy
import hashlib
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from deploykit.backbones.build import build_backbone
from deploykit.backbones.inspection import count_macs
from deploykit.data import ImageSet, open_dataset
from deploykit.environment import environment, version
from deploykit.errors import TargetMissingError, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.quantized import QuantizedModel
from deploykit.images import Images, calibration_images, verification_images
from deploykit.progress import Reporter
from deploykit.prune.semi_structured import sparsify_2_4
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.recipe import QuantizeSection, Recipe
from deploykit.recipe_io import dump_recipe
from deploykit.report.model import LayerError, Report
from deploykit.report.write import write_report
from deploykit.targets.registry import get_target
from deploykit.types import Artifact, Backbone, PassRecord
from deploykit.verdict import judge
from deploykit.verify import check_parity, measure_accuracy, measure_latency
from deploykit.workspace import Workspace, open_workspace

__all__ = ["default_output", "run"]


def default_output(recipe: Recipe) -> Path:
    """``out/<model>-<bits>`` in the working folder."""
    stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in recipe.model.name)
    return Path("out") / f"{stem[-80:]}-{recipe.quantize.bits}"


def run(
    recipe: Recipe,
    out: Path,
    *,
    command: str,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
) -> Report:
    """Carry out a recipe and write everything to ``out``.

    Gates that fail and parity that is missed don't raise: they are in the report, with its
    ``exit_code``.

    Raises:
        DeploykitError: the run could not be carried out; nothing new is left in ``out`` then,
            unless it can be resumed.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    targets = [get_target(name) for name in recipe.targets]
    for target in targets:
        if (reason := target.available()) is not None:
            raise TargetMissingError(f"target {target.name}: {reason}")
    backbone, notes = build_backbone(recipe.model, recipe.seed)
    inputs = _Inputs(recipe, backbone)
    for note in [*notes, *inputs.notes]:
        reporter.note(note)

    text = dump_recipe(recipe)
    workspace = open_workspace(out, text, version(), resume=resume, overwrite=overwrite)
    try:
        job = _Job(recipe, text, backbone, inputs, workspace, reporter)
        report = job.report(command, started.isoformat(timespec="seconds"), clock, notes)
        workspace.write(out / "recipe.yaml", text.encode())
        write_report(report, out)
    except UsageError:
        workspace.discard()
        raise
    workspace.finish()
    return report


class _Inputs:
    """The images of a run, opened before anything is written, so bad data fails early."""

    def __init__(self, recipe: Recipe, backbone: Backbone) -> None:
        self.notes: list[str] = []
        if recipe.gates.max_drop is not None and not backbone.weights.trained:
            message = (
                "max-drop needs trained weights, but this run has none "
                f"({backbone.weights.source}); give --weights FILE or leave the limit out"
            )
            raise UsageError(message)
        section = recipe.calibration
        self.calibration: Images = calibration_images(
            section.data, backbone, section.images, recipe.seed
        )
        if section.data is None:
            self.notes.append(
                "no calibration images given: using synthetic ones; give --calib DIR for real use"
            )
        self.evaluation: ImageSet | None = None
        if recipe.evaluation.data is not None and backbone.weights.trained:
            self.evaluation = open_dataset(
                recipe.evaluation.data,
                backbone.preprocessing,
                labelled=True,
                num_classes=backbone.num_classes,
                limit=recipe.evaluation.images,
                seed=recipe.seed,
            )
        elif recipe.evaluation.data is not None:
            self.notes.append("accuracy refused: the weights are untrained")
        self.verification: Images = verification_images(
            self.evaluation, self.calibration, recipe.verify.images
        )


@dataclass
class _Job:
    """One run past its input checks. Each property is a step, done once, when first needed."""

    recipe: Recipe
    recipe_text: str
    backbone: Backbone
    inputs: _Inputs
    workspace: Workspace
    reporter: Reporter

    @cached_property
    def pruned(self) -> tuple[Backbone, list[PassRecord]]:
        if self.recipe.prune.sparsity == "none":
            return self.backbone, []
        module, record = sparsify_2_4(self.backbone.module)
        return replace(self.backbone, module=module), [record]

    @cached_property
    def original(self) -> CapturedModel:
        with self.reporter.step("capture"):
            return capture(self.backbone)

    @cached_property
    def quantized(self) -> QuantizedModel:
        images = self.inputs.calibration
        size = self.recipe.calibration.batch_size
        captured = self.original
        if self.pruned[1]:
            with self.reporter.step("capture, pruned"):
                captured = capture(self.pruned[0])
        title = f"calibrate on {images.count} images and quantise"
        with self.reporter.step(title, total=2 * images.count) as advance:
            return quantize(
                captured,
                quantize_options(self.recipe.quantize),
                lambda: images.batches(size),
                advance,
                (self.workspace.work / "histograms.safetensors", self.workspace.write),
            )

    @cached_property
    def artifacts(self) -> list[Artifact]:
        quantized, original = self.quantized, self.original
        weights = self.backbone.weights.label
        common = {
            "deploykit_version": version(),
            "model": self.backbone.name,
            "weights": weights,
            "weights_sha256": self.backbone.weights.sha256 or "",
            "recipe_sha256": hashlib.sha256(self.recipe_text.encode()).hexdigest(),
        }
        plans = [
            ("original", "original.onnx", original.graph_module, "fp32", original.dynamic_batch),
            (
                "compressed",
                "model.onnx",
                quantized.graph_module,
                quantized.bits,
                quantized.dynamic_batch,
            ),
        ]
        made = []
        for name, filename, graph_module, precision, dynamic in plans:
            path = self.workspace.out / filename

            def write(
                path: Path = path,
                graph_module: torch.fx.GraphModule = graph_module,
                precision: str = precision,
                dynamic: bool = dynamic,
            ) -> dict[str, object]:
                with self.reporter.step(f"write {path.name}"):
                    data = onnx_bytes(
                        graph_module,
                        self.backbone,
                        dynamic_batch=dynamic,
                        metadata={**common, "precision": precision},
                    )
                    self.workspace.write(path, data)
                return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

            facts: dict[str, Any] = self.workspace.cached(f"artifact-{name}", write)
            split: dict[str, Any] = quantized.how_it_runs() if name == "compressed" else {}
            made.append(
                Artifact(
                    name=name,
                    format="onnx",
                    path=path,
                    precision=precision,
                    weights=weights,
                    **facts,
                    **split,
                )
            )
        return made

    def report(self, command: str, started: str, clock: float, notes: list[str]) -> Report:
        recipe, quantized = self.recipe, self.quantized
        artifacts = self.artifacts
        parity = check_parity(
            recipe, self.workspace, self.reporter, self.original, quantized, artifacts,
            self.inputs.verification,
        )  # fmt: skip
        accuracy = measure_accuracy(
            recipe, self.workspace, self.reporter, quantized, artifacts, self.inputs.evaluation
        )
        measurements = measure_latency(
            recipe, self.workspace, self.reporter, self.backbone, artifacts
        )
        module = self.backbone.module
        report = Report(
            deploykit_version=version(),
            command=command,
            started=started,
            seconds=round(time.monotonic() - clock, 1),
            model=self.backbone.name,
            parameters=sum(p.numel() for p in module.parameters()),
            macs=count_macs(copy.deepcopy(module), self.backbone.preprocessing.size),
            preprocessing=self.backbone.preprocessing,
            weights=self.backbone.weights,
            bits=quantized.bits,
            calibration=self.inputs.calibration.description,
            verdict="ok",
            verdict_reasons=[],
            artifacts=artifacts,
            accuracy=accuracy,
            parity=parity,
            measurements=measurements,
            layers=[
                LayerError(
                    layer=plan.layer,
                    op=plan.op,
                    bits=plan.bits,
                    sqnr_db=quantized.layer_sqnr_db[plan.node],
                )
                for plan in quantized.plans
                if plan.node in quantized.layer_sqnr_db
            ],
            passes=[*self.pruned[1], *quantized.records],
            environment=environment(),
            recipe=recipe.model_dump(mode="json"),
            warnings=[*notes, *self.inputs.notes],
        )
        return judge(report, recipe.gates)


def quantize_options(section: QuantizeSection) -> QuantizeOptions:
    """The recipe's quantize section in the quant room's terms."""
    widths = section.widths
    return QuantizeOptions(
        weight_bits=widths.weights,
        input_bits=widths.activations,
        activation_range=section.activation_range,
        weight_range=section.weight_range,
        fold_norms=section.fold_norms,
        softmax=section.softmax,
        edge_bits=section.edge_bits,
        keep_8bit=tuple(section.keep_8bit),
        float_layers=tuple(section.float_layers),
    )
