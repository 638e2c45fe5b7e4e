"""The one flow: backbone, captured graph, quantised graph, files, verified, measured, reported."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from torch import Tensor

from deploykit.artifacts import (
    ArtifactWriter,
    chosen_exporters,
    chosen_targets,
    size_and_hash,
)
from deploykit.backbones.build import build_backbone
from deploykit.environment import environment, version
from deploykit.errors import DeploykitError, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.registry import Exporter, Profile
from deploykit.export.structure import STRUCTURE_NAME, TENSORS_NAME, model_bytes
from deploykit.fidelity import measure_fidelity
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.classes import select_classes
from deploykit.graph.macs import count_macs
from deploykit.graph.quantized import QuantizedModel
from deploykit.inputs import Inputs
from deploykit.optimize_for import check_target, layer_profiles
from deploykit.placement_search import Placement
from deploykit.progress import Reporter
from deploykit.prune.recover import import_accelerate
from deploykit.quant.nncf_algorithm import has_attention, import_nncf, nncf_onnx
from deploykit.quant.research_integer import replace_with_integer_ops
from deploykit.quantizing import Quantizing
from deploykit.recipe import Recipe
from deploykit.recipe_io import dump_recipe
from deploykit.report.model import OWN_ARTIFACTS, LayerError, Report
from deploykit.report.write import write_report
from deploykit.stages import Stage, Stages
from deploykit.targets.registry import Target
from deploykit.types import (
    STAGES,
    Artifact,
    Backbone,
    LayerProfile,
    ParityRow,
    PassRecord,
)
from deploykit.verdict import judge
from deploykit.verify import check_parity, measure_accuracy, measure_latency
from deploykit.workspace import Workspace, open_workspace, output_folder

__all__ = ["default_output", "run"]


def default_output(recipe: Recipe) -> Path:
    """``out/<model>-<bits>`` in the working folder, with the algorithm if it isn't ours."""
    section = recipe.quantize
    maps = "-features" if recipe.model.gives_features else ""
    if section.algorithm == "none":
        return output_folder(recipe.model.name, f"pruned{maps}")
    other = "" if section.algorithm == "deploykit" else f"-{section.algorithm}"
    return output_folder(recipe.model.name, f"{section.bits}{other}{maps}")


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
    targets = chosen_targets(recipe.targets)
    if recipe.quantize.optimize_for is not None:
        check_target(recipe.quantize.optimize_for)
    exporters = chosen_exporters(recipe, targets)
    if recipe.quantize.uses_nncf:
        import_nncf()
    if recipe.recover.active:
        import_accelerate()
    backbone, notes = build_backbone(recipe.model, recipe.seed)
    inputs = Inputs(recipe, backbone)
    for note in [*notes, *inputs.notes]:
        reporter.note(note)

    text = dump_recipe(recipe)
    workspace = open_workspace(out, text, version(), resume=resume, overwrite=overwrite)
    try:
        job = _Job(recipe, text, backbone, inputs, workspace, reporter, targets, exporters)
        report = job.report(command, started.isoformat(timespec="seconds"), clock, notes)
        workspace.write(out / "recipe.yaml", text.encode())
        write_report(report, out)
    except UsageError:
        workspace.discard()
        raise
    workspace.finish()
    return report


@dataclass
class _Job:
    """One run past its input checks. Each property is a step, done once, when first needed."""

    recipe: Recipe
    recipe_text: str
    backbone: Backbone
    inputs: Inputs
    workspace: Workspace
    reporter: Reporter
    targets: list[Target]
    exporters: list[Exporter]

    @cached_property
    def original(self) -> CapturedModel:
        with self.reporter.step("capture"):
            captured = capture(self.backbone)
        classes = self.recipe.model.classes
        return captured if classes is None else select_classes(captured, classes)

    @cached_property
    def stages(self) -> list[Stage]:
        return Stages(
            self.recipe, self.backbone, self.inputs, self.workspace, self.reporter, self.original
        ).run()

    @cached_property
    def source(self) -> CapturedModel:
        """What is quantised: the original, or what the last step made of it."""
        return self.stages[-1].model if self.stages else self.original

    @property
    def steps(self) -> dict[str, CapturedModel]:
        """The original's graph and those of the steps after it; ``source`` is the last."""
        return {"original": self.original} | {stage.name: stage.model for stage in self.stages}

    @property
    def floats(self) -> dict[str, CapturedModel]:
        """The graphs of the float files, by the files' names; what is quantised comes last."""
        found, placement = self.steps, self.placement
        if self.recipe.quantize.algorithm == "none":
            found["compressed"] = found.pop(self.stages[-1].name)
        elif placement is not None and not placement.quantise:
            found["compressed"] = found[placement.baseline]
        return found

    @cached_property
    def quantizing(self) -> Quantizing:
        return Quantizing(
            self.recipe, self.backbone, self.source, self.steps, self.inputs, self.workspace,
            self.reporter, self.exporters, self.writer,
        )  # fmt: skip

    @property
    def quantized(self) -> dict[Profile, QuantizedModel]:
        """The quantised graph of every profile the formats want; none where others quantise, or
        where the target is faster without."""
        return self.quantizing.models

    @property
    def placement(self) -> Placement | None:
        """What was decided for ``quantize.optimize_for``."""
        return self.quantizing.placement

    @cached_property
    def writer(self) -> ArtifactWriter:
        return ArtifactWriter(
            self.workspace, self.reporter, self.backbone, self.metadata, self.recipe.batches
        )

    @property
    def main(self) -> QuantizedModel | None:
        """The quantised graph of the first target."""
        return next(iter(self.quantized.values()), None)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What every file of the run says about itself."""
        return {
            "deploykit_version": version(),
            "model": self.backbone.name,
            "weights": self.backbone.weights.label,
            "weights_sha256": self.backbone.weights.sha256 or "",
            "recipe_sha256": hashlib.sha256(self.recipe_text.encode()).hexdigest(),
        }

    @cached_property
    def made(self) -> tuple[list[Artifact], list[PassRecord], list[str]]:
        """The files, what was done to make them, and what the user should know of them."""
        section, main = self.recipe.quantize, self.main
        writer = self.writer
        records = [record for stage in self.stages for record in stage.records]
        warnings: list[str] = []
        artifacts: list[Artifact] = []
        others = [("nncf", "nncf.onnx")] if "nncf" in section.compare else []
        if section.algorithm == "nncf":
            others.insert(0, ("compressed", "model.onnx"))
        elif main is not None:
            records += main.records
        if self.placement is not None:
            records.append(self.placement.record())
        for exporter in self.exporters:
            for name, floats in self.floats.items():
                # Steps on the way are there to be compared: one format is enough.
                if name not in STAGES or exporter.name in self.quantizing.step_formats:
                    artifacts.append(writer.write(exporter, name, floats, "fp32"))
            if main is not None:
                model = self.quantized[exporter.profile]
                artifacts.append(
                    writer.write(
                        exporter, "compressed", model, model.bits,
                        algorithm=f"deploykit {version()}", **model.how_it_runs(),
                    )
                )  # fmt: skip
        saved = main or self.floats.get("compressed")
        if saved is not None:
            self._save_graph(saved)
        for name, filename in others:
            try:
                artifact, record = self._by_nncf(writer, name, filename)
            except DeploykitError as error:
                if name == "compressed" or isinstance(error, UsageError):
                    raise
                warnings.append(f"not compared with {name}: {error}")
                continue
            artifacts.append(artifact)
            records.append(record)
            warnings += [f"{name}: {line}" for line in record.details.get("warnings", [])]
        return artifacts, records, warnings

    def _save_graph(self, model: CapturedModel | QuantizedModel) -> None:
        """The compressed graph itself, to be loaded again without pickle or the model's source."""

        def write() -> bool:
            with self.reporter.step(f"write {STRUCTURE_NAME}"):
                structure, tensors = model_bytes(
                    model.graph_module,
                    self.original.backbone,
                    precision=model.bits if isinstance(model, QuantizedModel) else "fp32",
                    dynamic_batch=model.dynamic_batch,
                )
                self.workspace.write(self.workspace.out / TENSORS_NAME, tensors)
                self.workspace.write(self.workspace.out / STRUCTURE_NAME, structure)
            return True

        self.workspace.cached("structure", write)

    def _by_nncf(
        self, writer: ArtifactWriter, name: str, filename: str
    ) -> tuple[Artifact, PassRecord]:
        path, images = self.workspace.out / filename, self.inputs.calibration

        def write() -> dict[str, object]:
            # A comparison is with what NNCF makes of the model as it came.
            captured = self.source if name == "compressed" else self.original
            size = self.quantizing.batch_size
            # NNCF starts from the same float file that everything is compared with.
            original = self.workspace.out / "original.onnx"
            if captured is self.original and original.exists():
                model = original.read_bytes()
            else:
                model = onnx_bytes(
                    captured.graph_module, self.backbone, dynamic_batch=captured.dynamic_batch
                )
            with self.reporter.step(f"quantise with nncf on {images.count} images") as advance:
                found = nncf_onnx(
                    model,
                    self.recipe.quantize.bits,
                    lambda: images.batches(size),
                    images.count,
                    attention=has_attention(captured.graph_module),
                    metadata=self.metadata,
                    progress=advance,
                )
                self.workspace.write(path, found.data)
            facts = {"precision": found.bits, "algorithm": found.made_by, **found.how_it_runs}
            record = found.record.model_dump(mode="json")
            return {"facts": {**facts, **size_and_hash([path])}, "record": record}

        kept = self.workspace.cached(f"artifact-{name}", write)
        record = PassRecord.model_validate(kept["record"])
        return writer.artifact("onnx", name, path, **kept["facts"]), record

    def _research(self) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
        bits, quantized = self.recipe.evaluation.research_integer_ops, self.main
        if bits is None or quantized is None:
            return {}
        images, size = self.inputs.calibration, self.quantizing.batch_size

        def make() -> Callable[[Tensor], Tensor]:
            graph_module = copy.deepcopy(quantized.graph_module)
            replace_with_integer_ops(graph_module, lambda: images.batches(size), bits)
            return graph_module

        return {f"simulation, {bits}-bit integer softmax, GELU and LayerNorm": make}

    def report(self, command: str, started: str, clock: float, notes: list[str]) -> Report:
        recipe, quantized = self.recipe, self.main
        artifacts, records, remarks = self.made
        parity, unchecked = check_parity(
            recipe, self.workspace, self.reporter, self.floats, self.quantized, artifacts,
            self.targets, self.inputs.verification,
        )  # fmt: skip
        accuracy = measure_accuracy(
            recipe, self.workspace, self.reporter, self.original, quantized, artifacts,
            self.targets, self.inputs.evaluation, self._research(),
        )  # fmt: skip
        fidelity = measure_fidelity(
            recipe, self.workspace, self.reporter, self.backbone, artifacts, self.targets,
            self.inputs.fidelity,
        )  # fmt: skip
        measurements = measure_latency(
            recipe, self.workspace, self.reporter, self.backbone, artifacts, self.targets
        )
        layer_times: list[LayerProfile] = []
        if recipe.quantize.optimize_for is not None:
            layer_times = layer_profiles(
                recipe, self.workspace, self.reporter, artifacts, self.backbone.preprocessing.size
            )
        module = self.backbone.module
        report = Report(
            deploykit_version=version(),
            command=command,
            started=started,
            seconds=round(time.monotonic() - clock, 1),
            model=self.backbone.name,
            parameters=sum(p.numel() for p in module.parameters()),
            macs=count_macs(self.original.graph_module, self.backbone.preprocessing.size),
            preprocessing=self.backbone.preprocessing,
            weights=self.backbone.weights,
            bits=next(a.precision for a in artifacts if a.name == "compressed"),
            calibration=self.inputs.calibration.description,
            verdict="ok",
            verdict_reasons=[],
            artifacts=artifacts,
            accuracy=accuracy,
            levels=list(self.backbone.levels),
            fidelity=fidelity,
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
            ]
            if quantized is not None
            else [],
            layer_times=layer_times,
            passes=records,
            environment=environment(),
            recipe=recipe.model_dump(mode="json"),
            warnings=[*notes, *self.inputs.notes, *remarks, *unchecked, *_untrusted(parity)],
        )
        return judge(report, recipe.gates)


def _untrusted(parity: list[ParityRow]) -> list[str]:
    """Warnings of files the run doesn't answer for, and so doesn't fail on."""
    missed = {row.artifact for row in parity if not row.passed} - set(OWN_ARTIFACTS)
    return [f"{name}: its file missed parity; don't trust its figures" for name in sorted(missed)]
