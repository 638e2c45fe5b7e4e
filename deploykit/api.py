"""The Python API."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploykit.pipeline import default_output, run
from deploykit.progress import Reporter
from deploykit.recipe import Recipe
from deploykit.recipe_io import build_recipe, load_recipe, merged
from deploykit.report.gates import raise_for_gates
from deploykit.report.model import Report, load_report

__all__ = ["compress", "load_report", "options_to_recipe"]


def options_to_recipe(
    *,
    model: str | None = None,
    bits: str | int | None = None,
    algorithm: str | None = None,
    compare: list[str] | None = None,
    preset: str | None = None,
    time_budget: float | None = None,
    optimize_for: str | None = None,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    insert: str | None = None,
    features: bool | list[int] | None = None,
    calib: str | Path | None = None,
    calib_images: int | None = None,
    data: str | Path | None = None,
    targets: list[str] | None = None,
    formats: list[str] | None = None,
    prune: float | None = None,
    prune_budget: str | None = None,
    prune_importance: str | None = None,
    prune_scope: list[str] | None = None,
    prune_blocks: int | None = None,
    tokens: str | int | list[int] | None = None,
    sparsity: str | None = None,
    sparsity_method: str | None = None,
    recover: str | Path | None = None,
    recover_minutes: float | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    max_drop: float | None = None,
    max_latency_ms: float | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """The command line's options as the nested data of a recipe; what isn't given is left out."""
    given: dict[tuple[str, ...], object] = {
        ("model", "name"): model,
        ("model", "weights"): None if weights is None else str(weights),
        ("model", "num_classes"): num_classes,
        ("model", "img_size"): img_size,
        ("model", "insert"): insert,
        ("model", "features"): features,
        ("quantize", "bits"): bits,
        ("quantize", "algorithm"): algorithm,
        ("quantize", "compare"): compare,
        ("quantize", "preset"): preset,
        ("quantize", "time_budget_s"): time_budget,
        ("quantize", "optimize_for"): optimize_for,
        ("calibration", "data"): None if calib is None else str(calib),
        ("calibration", "images"): calib_images,
        ("evaluation", "data"): None if data is None else str(data),
        ("targets",): targets,
        ("export", "formats"): formats,
        ("prune", "ratio"): prune,
        ("prune", "budget"): prune_budget,
        ("prune", "importance"): prune_importance,
        ("prune", "scope"): prune_scope,
        ("prune", "blocks"): prune_blocks,
        ("merge", "tokens"): tokens,
        ("sparsify", "pattern"): sparsity,
        ("sparsify", "method"): sparsity_method,
        ("recover", "data"): None if recover is None else str(recover),
        ("recover", "minutes"): recover_minutes,
        ("measure", "threads"): threads,
        ("measure", "batch_size"): batch_size,
        ("gates", "max_drop"): max_drop,
        ("gates", "max_latency_ms"): max_latency_ms,
        ("seed",): seed,
    }
    result: dict[str, Any] = {}
    for path, value in given.items():
        if value is not None:
            section = result
            for key in path[:-1]:
                section = section.setdefault(key, {})
            section[path[-1]] = value
    return result


def compress(
    recipe: Recipe | str | Path | Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    **options: Any,
) -> Report:
    """Compress, export, verify and measure a backbone.

    Args:
        recipe: a Recipe, its file, or its nested data; or none, with everything in ``options``.
        out: output folder; ``out/<model>-<bits>`` if None.
        resume: go on with an interrupted run of the same recipe in ``out``.
        overwrite: replace an earlier run's files in ``out``.
        quiet: no progress on standard error.
        **options: ``model``, ``bits``, ``algorithm``, ``compare``, ``preset``, ``time_budget``,
            ``optimize_for``, ``weights``, ``num_classes``, ``img_size``, ``insert``,
            ``features`` (or the numbers of the maps), ``calib``, ``calib_images``, ``data``,
            ``targets``, ``formats``, ``prune``, ``tokens``, ``sparsity``, ``recover``,
            ``recover_minutes``, ``threads``, ``batch_size``, ``max_drop``, ``max_latency_ms``,
            ``seed``; as on the command line.

    Returns:
        The report; its ``exit_code`` is what the command line would exit with (8 on untrained
        weights nobody asked for).

    Raises:
        UsageError: the recipe or its inputs are no good.
        ParityError, AccuracyGateError, LatencyGateError, MeasurementError: the run finished and
            its files are in ``out``, but parity or a gate of the recipe failed.
        TargetMissingError: a target's runtime, or NNCF where it is asked for, isn't installed.
    """
    given = options_to_recipe(**options)
    if isinstance(recipe, str | Path):
        resolved = load_recipe(recipe, options=given)
    elif isinstance(recipe, Recipe):
        data = recipe.model_dump(mode="json", exclude_unset=True)
        resolved = build_recipe(merged(data, given), "compress()") if given else recipe
    else:
        resolved = build_recipe(merged(dict(recipe or {}), given), "compress()")
    report = run(
        resolved,
        Path(out) if out is not None else default_output(resolved),
        command="deploykit.compress()",
        reporter=Reporter(quiet=quiet),
        resume=resume,
        overwrite=overwrite,
    )
    raise_for_gates(report.gates)
    return report
