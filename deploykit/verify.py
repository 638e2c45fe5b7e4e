"""The files on disk, asked: do they compute the same, how right are they, how fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from deploykit.data import ImageSet
from deploykit.errors import DeploykitError, one_line
from deploykit.evaluate import paired_accuracy, top1_and_predictions
from deploykit.export.parity import Reference, compare, make_reference
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import FLOAT, QuantizedModel
from deploykit.images import Images
from deploykit.progress import Reporter
from deploykit.recipe import Recipe
from deploykit.runtimes import import_onnxruntime
from deploykit.targets.device import allowed_cores
from deploykit.targets.measure import measure
from deploykit.targets.registry import get_target
from deploykit.types import Accuracy, Artifact, Backbone, Measurement, ParityRow
from deploykit.workspace import Workspace

__all__ = ["UNOPTIMIZED", "check_parity", "measure_accuracy", "measure_latency"]

_REFERENCE_BATCH = 8
Maker = Callable[[], Callable[[Tensor], Tensor]]
"""Makes a model when it is about to be run."""

UNOPTIMIZED = "no simulation: compared with the same file run without graph optimisations"
"""Name of the reference of a file that others quantised."""


def _runner(target: str, path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    session = get_target(target).load(path, threads)
    return lambda images: torch.from_numpy(session(images.numpy()))


def _in_batches(run: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    return torch.cat([run(batch) for batch in images.split(size)])


def check_parity(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    original: CapturedModel,
    quantized: QuantizedModel | None,
    artifacts: Sequence[Artifact],
    images: Images,
) -> list[ParityRow]:
    """Compare each artefact on each target with the graph it was lowered from.

    A file that others quantised comes from no graph of ours and has no simulation: it is compared
    with itself, run operator by operator as it is written. A model whose batch is fixed is
    compared at batch 1 only.

    Args:
        quantized: the graph of the artefact ``compressed``; None if others made that, too.
    """

    def compute() -> list[dict[str, object]]:
        batch_sizes = recipe.verify.batch_sizes if original.dynamic_batch else (1,)
        total = len(artifacts) * (1 + len(recipe.targets) * len(batch_sizes))
        rows = []
        with reporter.step(f"verify on {images.count} images", total=total) as advance:
            pixels = torch.cat(list(images.batches(images.count)))
            own = _REFERENCE_BATCH if original.dynamic_batch else 1
            references = _references(original, quantized, artifacts, pixels, own, recipe.seed)
            advance(len(artifacts))
            for target in recipe.targets:
                for artifact in artifacts:
                    run = _runner(target, artifact.path, len(allowed_cores()))
                    for batch in batch_sizes:
                        logits = _in_batches(run, pixels, batch)
                        row = compare(
                            artifact.name, target, batch, logits,
                            references[artifact.name], images.description,
                        )  # fmt: skip
                        rows.append(row.model_dump(mode="json"))
                        advance(1)
        return _finite(rows)

    return [ParityRow.model_validate(row) for row in workspace.cached("parity", compute)]


def _finite(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """JSON has no infinity; pydantic reads it back from text."""
    return [
        {k: str(v) if isinstance(v, float) and v in (float("inf"), float("-inf")) else v
         for k, v in row.items()}
        for row in rows
    ]  # fmt: skip


def _references(
    original: CapturedModel,
    quantized: QuantizedModel | None,
    artifacts: Sequence[Artifact],
    pixels: Tensor,
    batch: int,
    seed: int,
) -> dict[str, Reference]:
    floats = make_reference(
        "float model (torch)",
        lambda x: _in_batches(original.graph_module, x, batch),
        pixels,
        None,
        seed,
    )
    references = {"original": floats}
    for artifact in artifacts:
        if artifact.name == "original":
            continue
        run: Callable[[Tensor], Tensor]
        if artifact.name == "compressed" and quantized is not None:
            name, run = "simulation (torch)", quantized
            rounds_inside = any(plan.input_bits != FLOAT for plan in quantized.plans)
        else:
            name, run = UNOPTIMIZED, _as_written(artifact.path)
            rounds_inside = not artifact.precision.endswith(f"a{FLOAT}")
        references[artifact.name] = make_reference(
            name,
            partial(_in_batches, run, size=batch),
            pixels,
            floats.logits if rounds_inside else None,
            seed,
        )
    return references


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
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def measure_accuracy(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    original: CapturedModel,
    quantized: QuantizedModel | None,
    artifacts: Sequence[Artifact],
    images: ImageSet | None,
    research: Mapping[str, Maker] | None = None,
) -> list[Accuracy]:
    """Top-1 of every artefact on the labelled images, paired with the original's.

    The files run, on the first target. Without labelled images or trained weights: an empty list.

    Args:
        research: simulations that no file has, made when they are run, by what the report calls
            them.
    """
    if images is None:
        return []
    assert images.labels is not None
    data, size = images, recipe.evaluation.batch_size if original.dynamic_batch else 1
    target = recipe.targets[0]

    def predictions(title: str, run: Callable[[Tensor], Tensor]) -> list[int]:
        with reporter.step(f"accuracy of the {title}, {len(data)} images", len(data)) as advance:
            seen = 0

            def progress(done: int) -> None:
                nonlocal seen
                advance(done - seen)
                seen = done

            found: list[int] = top1_and_predictions(run, data, size, progress).tolist()
            return found

    def of_artifact(artifact: Artifact) -> list[int]:
        return predictions(artifact.name, _runner(target, artifact.path, len(allowed_cores())))

    found = {
        artifact.name: torch.tensor(
            workspace.cached(
                f"predictions-{artifact.name}",
                partial(of_artifact, artifact),
            )
        )
        for artifact in artifacts
    }
    simulated: float | None = None
    if recipe.evaluation.simulation and quantized is not None:
        run = quantized
        simulation = torch.tensor(
            workspace.cached("predictions-simulation", lambda: predictions("simulation", run))
        )
        simulated = 100 * float((simulation == images.labels).double().mean())
    results = []
    for artifact in artifacts:
        if artifact.name == "original":
            continue
        result = paired_accuracy(
            artifact.name, images.labels, found["original"], found[artifact.name], data.description
        )
        ours = simulated if artifact.name == "compressed" else None
        results.append(result.model_copy(update={"simulated_top1": ours}))
    for number, (name, make) in enumerate((research or {}).items()):

        def of_research(name: str = name, make: Maker = make) -> list[int]:
            return predictions(name, make())

        kept = workspace.cached(f"predictions-research-{number}", of_research)
        results.append(
            paired_accuracy(
                name, images.labels, found["original"], torch.tensor(kept), data.description
            )
        )
    return results


def measure_latency(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    backbone: Backbone,
    artifacts: Sequence[Artifact],
) -> list[Measurement]:
    """Latency and memory of all artefacts on every target, interleaved, in fresh processes."""
    section, size = recipe.measure, backbone.preprocessing.size
    results: list[Measurement] = []
    for target in recipe.targets:

        def compute(target: str = target) -> list[dict[str, object]]:
            with reporter.step(f"latency on {target}", total=1.0) as advance:
                seen = 0.0

                def progress(fraction: float, _: str) -> None:
                    nonlocal seen
                    advance(max(fraction - seen, 0.0))
                    seen = max(fraction, seen)

                found = measure(
                    target,
                    [(a.name, a.path, a.precision) for a in artifacts],
                    batch=section.batch_size,
                    input_shape=(3, size, size),
                    threads=section.threads,
                    min_samples=section.min_samples,
                    min_seconds=section.min_seconds,
                    max_seconds=section.max_seconds,
                    warmup_seconds=section.warmup_seconds,
                    seed=recipe.seed,
                    progress=progress,
                )
            return [m.model_dump(mode="json") for m in found]

        rows = workspace.cached(f"latency-{target}", compute)
        results += [Measurement.model_validate(row) for row in rows]
    return results
