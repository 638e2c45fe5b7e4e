"""Files timed as a recipe's ``measure`` section asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from deploykit.progress import as_fractions
from deploykit.recipe import Recipe
from deploykit.targets.measure import measure
from deploykit.types import Measurement

__all__ = ["measure_as_asked"]


def measure_as_asked(
    recipe: Recipe,
    target: str,
    files: Sequence[tuple[str, Path, str]],
    size: int,
    advance: Callable[[float], None],
) -> list[Measurement]:
    """``targets.measure.measure`` of files (name, path, precision) on images of ``size`` pixels.

    ``advance`` hears of each further share of the work that is done.

    Raises:
        DeploykitError: as ``measure``.
    """
    section = recipe.measure
    return measure(
        target,
        files,
        batch=section.batch_size,
        input_shape=(3, size, size),
        threads=section.threads,
        min_samples=section.min_samples,
        min_seconds=section.min_seconds,
        max_seconds=section.max_seconds,
        warmup_seconds=section.warmup_seconds,
        seed=recipe.seed,
        progress=as_fractions(advance),
    )
