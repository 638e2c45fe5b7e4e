"""``quantize.optimize_for``: trial files for one target, measured, and what was decided."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from deploykit.artifacts import loadable
from deploykit.errors import UsageError
from deploykit.export.registry import Exporter, Source
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import QuantizedModel
from deploykit.latency import measure_as_asked
from deploykit.latency_table import PLAIN
from deploykit.layer_profile import layer_costs
from deploykit.placement import compare_layers
from deploykit.placement_search import Attempt, Placement, Trial, decide, search
from deploykit.profile import ProfiledFile, profiles_of
from deploykit.progress import Reporter, as_fractions
from deploykit.quant.options import PresetName
from deploykit.quant.plan import plan_layers
from deploykit.quant.quantize import quantize
from deploykit.quant.symmetry import Symmetry
from deploykit.quantize_options import quantize_options
from deploykit.recipe import QuantizeSection, Recipe
from deploykit.targets.profiling.kernels import get_reader
from deploykit.targets.registry import get_target
from deploykit.types import Artifact, LayerProfile, Measurement
from deploykit.workspace import Workspace

__all__ = ["PlacementSearch", "check_target", "layer_profiles", "placed"]

_SHOWN = ("original", "compressed")


def check_target(name: str) -> None:
    """Whether layers can be placed for a target.

    Raises:
        TargetMissingError: no profiler of it is read.
        UsageError: it runs integers as floats, so that no placement is faster than none.
    """
    get_reader(name)
    if get_target(name).exporter == "torch":
        message = (
            f"quantize.optimize_for {name}: codes are simulated in floats there, so no layer is "
            "faster quantised; name a target with integer kernels, such as cpu-onnxruntime"
        )
        raise UsageError(message)


def placed(section: QuantizeSection, layers: list[str]) -> QuantizeSection:
    """The section with these layers in float beside those that it leaves there itself."""
    names = [*section.float_layers, *(glob.escape(layer) for layer in layers)]
    return section.model_copy(update={"float_layers": names})


def layer_profiles(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    artifacts: list[Artifact],
    size: int,
) -> list[LayerProfile]:
    """Where the time of the original and of the file that ships goes, on ``optimize_for``."""
    target = recipe.quantize.optimize_for
    assert target is not None
    files = [a for a in loadable(artifacts, get_target(target)) if a.name in _SHOWN]

    def compute() -> list[dict[str, object]]:
        found = _profiles(recipe, target, files, size, reporter)
        return [one.model_dump(mode="json") for one in found]

    rows = workspace.cached(f"layers-{target}", compute)
    return [LayerProfile.model_validate(row) for row in rows]


def _profiles(
    recipe: Recipe, target: str, files: list[Artifact], size: int, reporter: Reporter
) -> list[LayerProfile]:
    """Profiles as the recipe measures: batch, threads, seconds, seed."""
    section = recipe.measure
    with reporter.step(f"time by layer on {target}", total=1.0) as advance:
        return profiles_of(
            target,
            [ProfiledFile(a.name, a.format, a.path) for a in files],
            size=size,
            batch=section.batch_size,
            threads=section.threads,
            seconds=min(section.max_seconds, max(section.min_seconds / 2, 0.1)),
            seed=recipe.seed,
            progress=as_fractions(advance),
        )


@dataclass(frozen=True)
class PlacementSearch:
    """The search for one run.

    Attributes:
        source: what is quantised.
        floats: the run's float files on the target, by name.
        symmetry: of the exporter's profile.
        batch: a batch of calibration images: values hardly matter to the time.
    """

    recipe: Recipe
    target: str
    exporter: Exporter
    symmetry: Symmetry
    preset: PresetName
    source: CapturedModel
    floats: Mapping[str, Artifact]
    batch: Callable[[], Tensor]
    workspace: Workspace
    reporter: Reporter

    def run(self) -> Placement:
        """Try placements; the same answer when a run is resumed."""

        def compute() -> dict[str, object]:
            baseline = self._baseline()
            paths: dict[frozenset[str], Path] = {}

            def attempt(floats: frozenset[str], best: Attempt | None) -> Attempt:
                # Kept trials lead a resumed search along the same way, so numbers will do.
                paths[floats] = self._place(len(paths))
                beside = None if best is None else paths[best.floats]
                return self._attempt(len(paths) - 1, baseline, floats, beside)

            best, tried = search(attempt, self.recipe.quantize.optimize_rounds)
            made = decide(self.target, baseline.name, len(self._layers), best, tried)
            return made.model_dump(mode="json")

        found = Placement.model_validate(self.workspace.cached("placement", compute))
        self.reporter.note(found.reason)
        return found

    def confirmed(self, placement: Placement, model: QuantizedModel) -> Placement:
        """The placement, if the file that would ship is as fast as its trial promised.

        Rounding and calibration on all images change values, and at few bits the kinds of grids.
        """

        def compute() -> dict[str, object]:
            place = self.workspace.work / "placement-final" / f"model{self.exporter.suffix}"
            path = self._export(model, place)
            baseline = self.floats[placement.baseline]
            trial = self._trial(baseline, path, None, placement.float_layers)
            if trial.ratio_high <= 1:
                return placement.model_dump(mode="json")
            attempt = Attempt(frozenset(), trial, compare_layers({}, {}))
            made = decide(self.target, baseline.name, placement.layers, attempt, [attempt])
            trials = [*placement.trials, trial]
            return made.model_copy(update={"trials": trials}).model_dump(mode="json")

        return Placement.model_validate(self.workspace.cached("placement-confirmed", compute))

    @property
    def _layers(self) -> list[str]:
        """Names of all that could be quantised and that the recipe leaves to us."""
        section = self.recipe.quantize
        plans = plan_layers(
            self.source.graph_module, 8, 8,
            float_layers=section.float_layers, layer_bits=tuple(section.layer_bits.items()),
        )  # fmt: skip
        return list(dict.fromkeys(plan.layer for plan in plans if not plan.is_float))

    def _baseline(self) -> Artifact:
        """The fastest float file."""
        files = list(self.floats.values())
        if len(files) == 1:
            return files[0]

        def compute() -> str:
            rows = self._measure("float files", [(a.name, a.path) for a in files])
            return min(rows, key=lambda row: row.p50_ms).artifact

        return self.floats[str(self.workspace.cached("placement-floats", compute))]

    def _attempt(
        self, number: int, baseline: Artifact, floats: frozenset[str], beside: Path | None
    ) -> Attempt:
        def compute() -> dict[str, object]:
            layers = [layer for layer in self._layers if layer in floats]
            self.reporter.note(
                f"placement {number + 1} for {self.target}: "
                + (f"in float: {', '.join(layers)}" if layers else "all layers quantised")
            )
            file = self._export(self._quantized(layers), self._place(number))
            trial = self._trial(baseline, file, beside, layers)
            ours = baseline.model_copy(update={"name": "trial", "path": file})
            size = self.source.backbone.preprocessing.size
            found = _profiles(self.recipe, self.target, [baseline, ours], size, self.reporter)
            return {
                "trial": trial.model_dump(mode="json"),
                "profiles": [one.model_dump(mode="json") for one in found],
            }

        kept = self.workspace.cached(f"placement-{number}", compute)
        before, after = (LayerProfile.model_validate(one) for one in kept["profiles"])
        comparison = compare_layers(layer_costs(before), layer_costs(after), self._layers)
        return Attempt(floats, Trial.model_validate(kept["trial"]), comparison)

    def _place(self, number: int) -> Path:
        return self.workspace.work / f"placement-{number}" / f"model{self.exporter.suffix}"

    def _quantized(self, layers: list[str]) -> QuantizedModel:
        plain = {key: value for key, value in PLAIN.items() if key != "layer_bits"}
        section = placed(self.recipe.quantize.model_copy(update=plain), layers)
        options = quantize_options(section, self.recipe.seed, self.preset)
        batch = self.batch()
        with self.reporter.step("quantise plainly"):
            return quantize(self.source, replace(options, symmetry=self.symmetry), lambda: [batch])

    def _export(self, model: QuantizedModel, path: Path) -> Path:
        self.workspace.fresh_folder(path.parent.name)
        with self.reporter.step(f"write a trial {self.exporter.name} file"):
            self.exporter.export(
                Source(model.graph_module, model.backbone, model.bits, model.dynamic_batch), path
            )
        return path

    def _trial(self, baseline: Artifact, path: Path, best: Path | None, layers: list[str]) -> Trial:
        files = [(baseline.name, baseline.path), ("trial", path)]
        if best is not None:
            files.append(("best so far", best))
        rows = self._measure("trial", files)
        ratios = [row.ratio for row in rows]
        row = rows[1]
        assert row.ratio is not None
        assert row.ratio_low is not None
        assert row.ratio_high is not None
        return Trial(
            float_layers=layers,
            p50_ms=row.p50_ms,
            ratio=row.ratio,
            ratio_low=row.ratio_low,
            ratio_high=row.ratio_high,
            best_ratio=ratios[2] if best is not None else None,
            noisy=row.noisy,
        )

    def _measure(self, what: str, files: list[tuple[str, Path]]) -> list[Measurement]:
        size = self.source.backbone.preprocessing.size
        with self.reporter.step(f"time the {what} on {self.target}", total=1.0) as advance:
            named = [(name, path, "") for name, path in files]
            return measure_as_asked(self.recipe, self.target, named, size, advance)
