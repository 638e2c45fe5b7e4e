"""How near a file's feature maps are to the original file's: what stands in for accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from deploykit.artifacts import loadable
from deploykit.export.target_reader import loaded
from deploykit.graph.levels import split_joined
from deploykit.graph.signal import decibels
from deploykit.images import Images
from deploykit.progress import Reporter
from deploykit.recipe import Recipe
from deploykit.targets.device import allowed_cores
from deploykit.targets.registry import Target
from deploykit.types import Artifact, Backbone, FeatureLevel, Fidelity
from deploykit.workspace import Workspace

__all__ = ["LevelError", "measure_fidelity"]

_MOST_VALUES = 2**25  # of a batch's feature maps


class LevelError:
    """Squared sums of one level's values and of what a file adds to them, over many images."""

    def __init__(self) -> None:
        self.signal, self.noise, self.images = 0.0, 0.0, 0
        self.worst_db = math.inf

    def add(self, wanted: Tensor, got: Tensor) -> None:
        """A batch of both files' values, float32 (n, values)."""
        signal = wanted.double().square().sum(1)
        noise = (got.double() - wanted.double()).square().sum(1)
        noise = noise.nan_to_num(nan=math.inf)  # a map with no numbers in it is all noise
        self.signal += float(signal.sum())
        self.noise += float(noise.sum())
        self.images += len(wanted)
        pairs = zip(signal.tolist(), noise.tolist(), strict=True)
        self.worst_db = min([self.worst_db, *(decibels(*pair) for pair in pairs)])

    @property
    def sqnr_db(self) -> float:
        """Of all values added."""
        return decibels(self.signal, self.noise)

    @property
    def relative(self) -> float:
        """The error's 2-norm over the values'."""
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf


def measure_fidelity(
    recipe: Recipe,
    workspace: Workspace,
    reporter: Reporter,
    backbone: Backbone,
    artifacts: Sequence[Artifact],
    targets: Sequence[Target],
    images: Images | None,
) -> list[Fidelity]:
    """Every file's maps beside the original file's, level by level, on the same target.

    Each file runs on the first target that loads it.

    Args:
        images: what both files see; None, of models that give scores, gives an empty list.
    """
    if images is None:
        return []
    found: list[Fidelity] = []
    for target in targets:
        done = {(row.artifact, row.format) for row in found}
        original, *others = sorted(loadable(artifacts, target), key=lambda a: a.name != "original")
        files = [a for a in others if (a.name, a.format) not in done]
        if not files:
            continue
        dynamic = all(artifact.dynamic_batch for artifact in (original, *files))
        values = sum(level.values for level in backbone.levels)
        size = max(min(recipe.evaluation.batch_size, _MOST_VALUES // values), 1) if dynamic else 1
        compute = partial(_rows, original, files, target, images, size, backbone.levels, reporter)
        rows = workspace.cached(f"fidelity-{target.name}", compute)
        found += [Fidelity.model_validate(row) for row in rows]
    return found


def _rows(
    original: Artifact,
    files: Sequence[Artifact],
    target: Target,
    images: Images,
    batch_size: int,
    levels: Sequence[FeatureLevel],
    reporter: Reporter,
) -> list[dict[str, object]]:
    def load(artifact: Artifact) -> Callable[[Tensor], Tensor]:
        return loaded(target, artifact.path, len(allowed_cores()))

    reference, runs = load(original), [load(artifact) for artifact in files]
    errors = [[LevelError() for _ in levels] for _ in files]
    title = f"fidelity on {target.name}, {images.count} images"
    with reporter.step(title, images.count) as advance, torch.no_grad():
        for batch in images.batches(batch_size):
            wanted = split_joined(reference(batch), levels)
            for run, sums in zip(runs, errors, strict=True):
                for one, *pair in zip(sums, wanted, split_joined(run(batch), levels), strict=True):
                    one.add(*pair)
            advance(len(batch))
    return [
        {
            "artifact": artifact.name,
            "format": artifact.format,
            "target": target.name,
            "level": level.name,
            "data": images.description,
            "images": one.images,
            "sqnr_db": _as_json(one.sqnr_db),
            "relative_error": _as_json(one.relative),
            "worst_sqnr_db": _as_json(one.worst_db),
        }
        for artifact, sums in zip(files, errors, strict=True)
        for level, one in zip(levels, sums, strict=True)
    ]  # fmt: skip


def _as_json(figure: float) -> float | str:
    """JSON has no infinity; pydantic reads it back from text."""
    return figure if math.isfinite(figure) else str(figure)
