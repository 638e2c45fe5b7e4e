"""What changes a model before it is quantised: pruned, merged, sparse, recovered, in that order.

Each step takes a captured graph and gives a changed one. What a step made is kept in the work
folder as a structure with its tensors, and read back from there, so that a resumed run goes on
with exactly what an uninterrupted one had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from deploykit.export.structure import load_model, save_model
from deploykit.fsio import publish
from deploykit.graph.capture import CapturedModel, capture, with_shapes
from deploykit.graph.classes import select_classes
from deploykit.inputs import Inputs
from deploykit.layer_latency import measure_layers
from deploykit.progress import Reporter
from deploykit.prune.merge_tokens import merge_tokens
from deploykit.prune.sparsity import sparsify
from deploykit.prune.structured import prune_structure
from deploykit.prune_options import merge_options, sparsity_options, structure_options
from deploykit.recipe import Recipe
from deploykit.recovery import recovered
from deploykit.token_choice import chosen_merging
from deploykit.types import Backbone, PassRecord
from deploykit.workspace import Workspace

__all__ = ["Stage", "Stages"]


@dataclass(frozen=True)
class Stage:
    """One step that is done.

    Attributes:
        name: one of ``STAGES``.
        model: what came out of it.
    """

    name: str
    model: CapturedModel
    records: list[PassRecord]


@dataclass(frozen=True)
class Stages:
    """The steps a recipe asks for."""

    recipe: Recipe
    backbone: Backbone
    inputs: Inputs
    workspace: Workspace
    reporter: Reporter
    original: CapturedModel

    def run(self) -> list[Stage]:
        """All steps, one after the other.

        Raises:
            UsageError: a step can't apply to this backbone.
        """
        steps: list[
            tuple[bool, str, Callable[[CapturedModel], tuple[CapturedModel, Sequence[PassRecord]]]]
        ]
        recipe = self.recipe
        steps = [
            (recipe.prune.active, "pruned", self._prune),
            (recipe.merge.active, "merged", self._merge),
            (recipe.sparsify.active, "sparse", self._sparsify),
            (recipe.recover.active, "recovered", self._recover),
        ]
        done: list[Stage] = []
        model = self.original
        for wanted, name, step in steps:
            if wanted:
                done.append(self._kept(name, model, step))
                model = done[-1].model
        return done

    def _kept(
        self,
        name: str,
        before: CapturedModel,
        step: Callable[[CapturedModel], tuple[CapturedModel, Sequence[PassRecord]]],
    ) -> Stage:
        folder = self.workspace.work / f"stage-{name}"

        def make() -> list[dict[str, object]]:
            model, records = step(before)
            fresh = self.workspace.fresh_folder(f"making-{name}")
            save_model(
                model.graph_module,
                before.backbone,
                fresh,
                precision="fp32",
                dynamic_batch=model.dynamic_batch,
            )
            publish(fresh, folder)
            return [record.model_dump(mode="json") for record in records]

        kept = self.workspace.cached(f"stage-{name}", make)
        records = [PassRecord.model_validate(record) for record in kept]
        saved = load_model(folder)
        backbone = replace(before.backbone, module=saved.backbone.module)
        model = CapturedModel(saved.graph_module, backbone, saved.dynamic_batch)
        return Stage(name, with_shapes(model), records)

    def _prune(self, model: CapturedModel) -> tuple[CapturedModel, Sequence[PassRecord]]:
        section, recipe = self.recipe.prune, self.recipe
        measure = None
        if section.budget == "latency":
            measure = partial(
                measure_layers, target=recipe.targets[0], threads=recipe.measure.threads
            )
        pruned, record = prune_structure(
            self.backbone,
            structure_options(section, recipe.seed),
            self._batches(model),
            measure=measure,
            steps=self.reporter.step,
        )
        captured = capture(pruned)
        if recipe.model.classes is not None:
            captured = select_classes(captured, recipe.model.classes)
        return captured, [record]

    def _merge(self, model: CapturedModel) -> tuple[CapturedModel, Sequence[PassRecord]]:
        if self.recipe.merge.tokens == "auto":
            merged, record = chosen_merging(self.recipe, self.inputs, model, self.reporter.step)
        else:
            merged, record = merge_tokens(model, merge_options(self.recipe.merge))
        return merged, [record]

    def _sparsify(self, model: CapturedModel) -> tuple[CapturedModel, Sequence[PassRecord]]:
        real = self.recipe.calibration.data is not None
        options = sparsity_options(self.recipe.sparsify, real_images=real)
        sparse, record = sparsify(model, options, self._batches(model), steps=self.reporter.step)
        return sparse, [record]

    def _recover(self, model: CapturedModel) -> tuple[CapturedModel, Sequence[PassRecord]]:
        checkpoints = self.workspace.work / "recovery"
        return recovered(self.recipe, model, self.original, checkpoints, self.reporter.step)

    def _batches(self, model: CapturedModel) -> Callable[[], Iterator[Tensor]]:
        """Calibration images, from the start each time."""
        images = self.inputs.calibration
        size = self.recipe.calibration.batch_size if model.dynamic_batch else 1
        return lambda: images.batches(size)
