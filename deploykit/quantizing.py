"""A run's quantised graphs: the preset, which layers stay in float, a graph for every profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from deploykit.artifacts import ArtifactWriter
from deploykit.export.registry import Exporter, Profile, get_exporter
from deploykit.fsio import ensure_directory
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import FLOAT, QuantizedModel
from deploykit.inputs import Inputs
from deploykit.optimize_for import PlacementSearch, placed
from deploykit.placement_search import Placement
from deploykit.progress import Reporter
from deploykit.quant.cache import TensorCache
from deploykit.quant.options import PresetName, QuantizeOptions
from deploykit.quant.presets import DEFAULT_BUDGET_S, choose_preset, seconds_per_image
from deploykit.quant.quantize import quantize
from deploykit.quant.symmetry import Symmetry
from deploykit.quantize_options import quantize_options
from deploykit.recipe import Recipe
from deploykit.targets.registry import get_target
from deploykit.types import Backbone, PassRecord
from deploykit.workspace import Workspace

__all__ = ["SYMMETRY", "Quantizing"]

SYMMETRY: dict[Profile, Symmetry] = {"asymmetric": "none", "mixed": "matmul", "symmetric": "all"}


@dataclass
class Quantizing:
    """The quantising of one run; each property is a step, done once, when first needed.

    Attributes:
        source: what is quantised: the last of ``floats``.
        floats: the graphs of the float files, by their names.
    """

    recipe: Recipe
    backbone: Backbone
    source: CapturedModel
    floats: Mapping[str, CapturedModel]
    inputs: Inputs
    workspace: Workspace
    reporter: Reporter
    exporters: Sequence[Exporter]
    writer: ArtifactWriter

    @property
    def models(self) -> dict[Profile, QuantizedModel]:
        """A graph of every profile that the formats want; none where others quantise, or where
        ``optimize_for`` found the float file faster."""
        return self._made[0]

    @property
    def placement(self) -> Placement | None:
        """What was decided for ``optimize_for``; None where it isn't asked for."""
        return self._made[1]

    @property
    def step_formats(self) -> set[str]:
        """Formats that the steps between the original and the compressed model are written in."""
        target = self.recipe.quantize.optimize_for
        wanted = {self.exporters[0].name}
        return wanted if target is None else wanted | {get_target(target).exporter}

    @property
    def batch_size(self) -> int:
        """Of calibration; 1 where the model fixes it."""
        return self.recipe.calibration.batch_size if self.source.dynamic_batch else 1

    @cached_property
    def preset(self) -> tuple[PresetName, str]:
        """The preset's name, and why it is that one; the same when a run is resumed."""
        section, images = self.recipe.quantize, self.inputs.calibration
        if section.preset is not None:
            return section.preset, "as asked"
        if not self.backbone.weights.trained:
            return "fast", "no accuracy to win on untrained weights"
        budget = section.time_budget_s or DEFAULT_BUDGET_S

        def choose() -> list[str]:
            batch = next(iter(images.batches(self.batch_size)))
            forward = seconds_per_image(self.source, batch)
            choice = choose_preset(*section.widths, forward, images.count, budget)
            return [choice.name, choice.reason]

        name, reason = self.workspace.cached("preset", choose)
        return name, reason

    @cached_property
    def _made(self) -> tuple[dict[Profile, QuantizedModel], Placement | None]:
        section = self.recipe.quantize
        if section.algorithm != "deploykit":
            return {}, None
        preset, reason = self.preset
        self.reporter.note(f"preset: {preset} ({reason})")
        record = PassRecord(name="preset", summary=f"{preset}: {reason}", details={})
        search, placement = self._search(preset), None
        if search is not None:
            placement = search.run()
            if not placement.quantise:
                return {}, placement
            section = placed(section, placement.float_layers)
        options = quantize_options(section, self.recipe.seed, preset)
        wanted = dict.fromkeys(exporter.profile for exporter in self.exporters)
        if section.widths.activations == FLOAT:
            made = dict.fromkeys(wanted, self._quantize("asymmetric", options, record))
        else:
            made = {profile: self._quantize(profile, options, record) for profile in wanted}
        if search is not None and placement is not None:
            placement = search.confirmed(placement, made[search.exporter.profile])
            if not placement.quantise:
                return {}, placement
        return made, placement

    def _quantize(
        self, profile: Profile, options: QuantizeOptions, record: PassRecord
    ) -> QuantizedModel:
        images, size = self.inputs.calibration, self.batch_size
        folder = ensure_directory(self.workspace.work / profile)
        made = quantize(
            self.source,
            replace(options, symmetry=SYMMETRY[profile]),
            lambda: images.batches(size),
            images=images.count,
            steps=self.reporter.step,
            cache=TensorCache(folder, self.workspace.write, self.workspace.work),
        )
        return replace(made, records=(record, *made.records))

    def _search(self, preset: PresetName) -> PlacementSearch | None:
        target = self.recipe.quantize.optimize_for
        if target is None:
            return None
        exporter = get_exporter(get_target(target).exporter)
        files = [self.writer.write(exporter, *one, "fp32") for one in self.floats.items()]
        return PlacementSearch(
            recipe=self.recipe,
            target=target,
            exporter=exporter,
            symmetry=SYMMETRY[exporter.profile],
            preset=preset,
            source=self.source,
            floats={file.name: file for file in files},
            batch=lambda: next(iter(self.inputs.calibration.batches(self.batch_size))),
            workspace=self.workspace,
            reporter=self.reporter,
        )
