"""The files on disk, asked: do they compute the same, how right are they, how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deploykit.artifacts import loadable
from deploykit.data import ImageSet
from deploykit.errors import DeploykitError, TargetMissingError, one_line
from deploykit.evaluate import paired_accuracy, top1_and_predictions
from deploykit.export.parity import (
    Reference,
    affordable_images,
    compare_levels,
    in_batches,
    make_reference,
)
from deploykit.export.registry import Profile, get_exporter
from deploykit.export.target_reader import loaded
from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import makes_choices
from deploykit.graph.execute import take
from deploykit.graph.quantized import FLOAT, QuantizedModel, has_activation_quantizers
from deploykit.images import Images
from deploykit.latency import measure_as_asked
from deploykit.progress import Reporter
from deploykit.recipe import Recipe
from deploykit.runtimes import import_onnxruntime
from deploykit.targets.device import allowed_cores
from deploykit.targets.registry import Target, joined
from deploykit.types import Accuracy, Artifact, Backbone, Measurement, ParityRow
from deploykit.workspace import Workspace

__all__ = ["UNOPTIMIZED", "check_parity", "measure_accuracy", "measure_latency"]

_REFERENCE_BATCH = 8
Maker = Callable[[], Callable[[Tensor], Tensor]]
"""Makes a model when it is about to be run."""

UNOPTIMIZED = "no simulation: compared with the same file run without graph optimisations"
"""Name of the reference of a file that others quantised."""


def check_parity(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    floats: Mapping[str, CapturedModel],
    simulations: Mapping[Profile, QuantizedModel],
    artifacts: Sequence[Artifact],
    targets: Sequence[Target],
    images: Images,
) -> tuple[list[ParityRow], list[str]]:
    """Compare each artefact, wherever it can be run here, with the graph it was lowered from.

    A format that none of the targets loads is run by its exporter's reader. A file that others
    quantised comes from no graph of ours and has no simulation: it is compared with itself, run
    operator by operator as it is written. A file whose batch is fixed is compared at batch 1
    only.

    Args:
        floats: the graphs of float artefacts, by their names; what is quantised comes last.
        simulations: the graphs of the artefacts ``compressed``; none if others made that, too.

    Returns:
        The rows, and a line for every file that nothing here can run.
    """

    def compute() -> dict[str, object]:
        places, unchecked = _places(artifacts, targets)
        total = sum(len(_batches(recipe, artifact)) for artifact, _, _ in places)
        rows = []
        with reporter.step(f"verify on {images.count} images", total=total) as advance:
            levels = next(iter(floats.values())).backbone.levels
            count = affordable_images(images.count, levels)
            data = images.description
            if count < images.count:
                data = f"first {count} of {data}"
            pixels = torch.cat(take(images.batches(count), count))
            dynamic = all(model.dynamic_batch for model in floats.values())
            size = _REFERENCE_BATCH if dynamic else 1
            references = _References(floats, simulations, pixels, size, recipe.seed)
            for artifact, runtime, load in places:
                run = load()
                for batch in _batches(recipe, artifact):
                    found = compare_levels(
                        artifact, runtime, batch, in_batches(run, pixels, batch),
                        references.of(artifact), data,
                    )  # fmt: skip
                    rows += [row.model_dump(mode="json") for row in found]
                    advance(1)
        return {"rows": _finite(rows), "unchecked": unchecked}

    found = workspace.cached("parity", compute)
    return [ParityRow.model_validate(row) for row in found["rows"]], found["unchecked"]


def _batches(recipe: Recipe, artifact: Artifact) -> tuple[int, ...]:
    return recipe.verify.batch_sizes if artifact.dynamic_batch else (1,)


def _places(
    artifacts: Sequence[Artifact], targets: Sequence[Target]
) -> tuple[list[tuple[Artifact, str, Maker]], list[str]]:
    """Every (artefact, runtime) there is to compare, and what can't be."""
    places: list[tuple[Artifact, str, Maker]] = []
    unchecked = []
    for target in targets:
        for artifact in loadable(artifacts, target):
            load = partial(loaded, target, artifact.path, len(allowed_cores()))
            if target.floats == "float16" and artifact.precision == "fp32":
                artifact = artifact.model_copy(update={"half": True})
            places.append((artifact, target.name, load))
    seen = {(artifact.name, artifact.format) for artifact, _, _ in places}
    for artifact in artifacts:
        if (artifact.name, artifact.format) in seen:
            continue
        try:
            reader = get_exporter(artifact.format).reader(artifact.path)
        except TargetMissingError as error:
            unchecked.append(f"{artifact.path.name}: parity not checked here: {error}")
            continue
        if reader is None:
            why = "no target of this run loads it"
            unchecked.append(f"{artifact.path.name}: parity not checked here: {why}")
            continue
        places.append((artifact, reader[0], partial(_same, reader[1])))
    return places, unchecked


def _same(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return run


def _finite(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """JSON has no infinity; pydantic reads it back from text."""
    return [
        {k: str(v) if isinstance(v, float) and v in (float("inf"), float("-inf")) else v
         for k, v in row.items()}
        for row in rows
    ]  # fmt: skip


class _References:
    """What the artefacts are compared with, each made when it is first wanted."""

    def __init__(
        self,
        floats: Mapping[str, CapturedModel],
        simulations: Mapping[Profile, QuantizedModel],
        pixels: Tensor,
        batch: int,
        seed: int,
    ) -> None:
        self.floats, self.simulations = floats, simulations
        self.pixels, self.batch, self.seed = pixels, batch, seed
        self.made: dict[str, Reference] = {}

    def of(self, artifact: Artifact) -> Reference:
        """The reference of an artefact."""
        if artifact.name in self.floats:
            return self._float(artifact.name)
        profile = get_exporter(artifact.format).profile
        ours = artifact.name == "compressed" and bool(self.simulations)
        key = f"{artifact.name} {profile}" if ours else artifact.name
        if key not in self.made:
            run: Callable[[Tensor], Tensor]
            simulation = self.simulations.get(profile)
            if ours and simulation is not None:
                name, run = "simulation (torch)", simulation
                rounds_inside = has_activation_quantizers(simulation.graph_module)
            else:
                name, run = UNOPTIMIZED, _as_written(artifact.path)
                rounds_inside = not artifact.precision.endswith(f"a{FLOAT}")
            quantized_from = list(self.floats)[-1] if artifact.name == "compressed" else "original"
            floats = self._float(quantized_from).logits if rounds_inside else None
            self.made[key] = self._make(name, run, floats, simulation if ours else None)
        return self.made[key]

    def _float(self, name: str) -> Reference:
        if name not in self.made:
            model = self.floats[name]
            unsure = name != "original" and makes_choices(model.graph_module)
            before = self._float("original").logits if unsure else None
            self.made[name] = self._make("float model (torch)", model.graph_module, before, model)
        return self.made[name]

    def _make(
        self,
        name: str,
        run: Callable[[Tensor], Tensor],
        floats: Tensor | None,
        model: CapturedModel | QuantizedModel | None,
    ) -> Reference:
        runs = partial(in_batches, run, size=self.batch)
        graph_module = model.graph_module if model is not None else None
        levels = next(iter(self.floats.values())).backbone.levels
        return make_reference(name, runs, self.pixels, floats, self.seed, graph_module, levels)


def _as_written(path: Path) -> Callable[[Tensor], Tensor]:
    """The file run by ONNX Runtime operator by operator, nothing fused or folded.

    Raises:
        DeploykitError: it can't be loaded.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = len(allowed_cores())
    options.use_deterministic_compute = True
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base of their own
        message = f"{path}: onnxruntime cannot load it: {one_line(error)}"
        raise DeploykitError(message) from error
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(joined(tuple(session.run(None, {name: images.numpy()}))))


def measure_accuracy(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    original: CapturedModel,
    quantized: QuantizedModel | None,
    artifacts: Sequence[Artifact],
    targets: Sequence[Target],
    images: ImageSet | None,
    research: Mapping[str, Maker] | None = None,
) -> list[Accuracy]:
    """Top-1 of every file that a target runs on the labelled images, paired with the original's.

    Each file runs once, on the first target that loads it, and is compared with the original's
    file on the same target. Without labelled images or trained weights: an empty list.

    Args:
        quantized: the first target's graph, for its simulation.
        research: simulations that no file has, made when they are run, by what the report calls
            them.
    """
    if images is None:
        return []
    assert images.labels is not None
    data = images

    def predictions(title: str, run: Callable[[Tensor], Tensor], size: int) -> list[int]:
        with reporter.step(f"accuracy of {title}, {len(data)} images", len(data)) as advance:
            seen = 0

            def progress(done: int) -> None:
                nonlocal seen
                advance(done - seen)
                seen = done

            found: list[int] = top1_and_predictions(run, data, size, progress).tolist()
            return found

    def of_artifact(artifact: Artifact, target: Target) -> list[int]:
        size = recipe.evaluation.batch_size if artifact.dynamic_batch else 1
        run = loaded(target, artifact.path, len(allowed_cores()))
        return predictions(artifact.path.name, run, size)

    def kept(artifact: Artifact, target: Target) -> Tensor:
        step = f"predictions-{artifact.format}-{artifact.name}-{target.name}"
        return torch.tensor(workspace.cached(step, partial(of_artifact, artifact, target)))

    size = recipe.evaluation.batch_size if original.dynamic_batch else 1
    simulated: float | None = None
    if recipe.evaluation.simulation and quantized is not None:
        run = quantized
        simulation = torch.tensor(
            workspace.cached(
                "predictions-simulation", lambda: predictions("the simulation", run, size)
            )
        )
        simulated = 100 * float((simulation == images.labels).double().mean())
    results: list[Accuracy] = []
    first: Tensor | None = None
    for target in targets:
        done = {(result.artifact, result.format) for result in results}
        files = loadable(artifacts, target)
        wanted = [a for a in files if a.name != "original" and (a.name, a.format) not in done]
        if not wanted:
            continue
        floats = kept(next(a for a in files if a.name == "original"), target)
        first = floats if first is None else first
        for artifact in wanted:
            result = paired_accuracy(
                artifact.name, images.labels, floats, kept(artifact, target), data.description
            )
            ours = simulated if artifact.name == "compressed" and target is targets[0] else None
            facts = {"format": artifact.format, "target": target.name, "simulated_top1": ours}
            results.append(result.model_copy(update=facts))
    if first is None:
        return results
    for number, (name, make) in enumerate((research or {}).items()):

        def of_research(name: str = name, make: Maker = make) -> list[int]:
            return predictions(name, make(), size)

        predicted = workspace.cached(f"predictions-research-{number}", of_research)
        results.append(
            paired_accuracy(name, images.labels, first, torch.tensor(predicted), data.description)
        )
    return results


def measure_latency(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    backbone: Backbone,
    artifacts: Sequence[Artifact],
    targets: Sequence[Target],
) -> list[Measurement]:
    """Latency and memory of all artefacts on every target, interleaved, in fresh processes."""
    size = backbone.preprocessing.size
    results: list[Measurement] = []
    for target in targets:

        def compute(target: Target = target) -> list[dict[str, object]]:
            with reporter.step(f"latency on {target.name}", total=1.0) as advance:
                files = [(a.name, a.path, a.precision) for a in loadable(artifacts, target)]
                found = measure_as_asked(recipe, target.name, files, size, advance)
            formats = {a.name: a.format for a in loadable(artifacts, target)}
            return [
                m.model_copy(update={"format": formats[m.artifact]}).model_dump(mode="json")
                for m in found
            ]

        rows = workspace.cached(f"latency-{target.name}", compute)
        results += [Measurement.model_validate(row) for row in rows]
    return results
