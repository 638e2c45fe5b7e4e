"""As many tokens merged as a limit of accuracy allows, found on calibration images."""

from __future__ import annotations

from collections.abc import Callable

from deploykit.data import ImageSet
from deploykit.evaluate import top1_and_predictions
from deploykit.graph.capture import CapturedModel
from deploykit.graph.execute import take
from deploykit.images import labelled_images
from deploykit.inputs import Inputs
from deploykit.progress import Steps
from deploykit.prune.merge_choose import choose_merging, disagreement
from deploykit.prune.merge_share import choose_share
from deploykit.prune_options import merge_options
from deploykit.recipe import Recipe
from deploykit.types import PassRecord

__all__ = ["chosen_merging"]

_DAMAGE_IMAGES = 32
_DROP = 1.0


def chosen_merging(
    recipe: Recipe, inputs: Inputs, model: CapturedModel, steps: Steps
) -> tuple[CapturedModel, PassRecord]:
    """The model with the most merged whose drop stays within ``merge.max_drop``.

    Tried are amounts for every block by the damage they do there, and large shares in three
    blocks; what leaves fewest multiply-adds is taken.

    Judged on ``merge.images`` images of the calibration folder: by their labels where it has
    any, else by how often the unmerged model answers otherwise. Never on the images that the run
    is rated on. Images that the model was trained on flatter it: it loses less on them.

    Raises:
        UsageError: nothing can be merged, or not within the limit.
    """
    section = recipe.merge
    limit = section.max_drop or recipe.gates.max_drop or _DROP
    size = recipe.calibration.batch_size if model.dynamic_batch else 1

    few = take(inputs.calibration.batches(size), _DAMAGE_IMAGES)  # run many times: read once
    labelled = _labelled(recipe, model)
    if labelled is None:
        evaluate, how = disagreement(model, lambda: few), "answers that changed"
    else:
        evaluate, how = _drop(model, labelled, size), f"labels of {labelled.description}"
    options = merge_options(section)
    found = [choose_merging(model, lambda: few, evaluate, limit, options, steps=steps)]
    in_few = choose_share(model, evaluate, limit, options, steps=steps)
    if in_few is not None:
        found.append(in_few)
    merged, record = min(found, key=lambda one: int(one[1].details["macs_after"]))
    details = {**record.details, "judged_by": how, "limit": limit}
    return merged, record.model_copy(update={"details": details})


def _labelled(recipe: Recipe, model: CapturedModel) -> ImageSet | None:
    folder = recipe.calibration.data
    if folder is None or not model.backbone.weights.trained:
        return None
    classes = recipe.model.classes
    count = max([model.backbone.num_classes, *(c + 1 for c in classes or ())])
    return labelled_images(
        folder, model.backbone.preprocessing, count, classes,
        limit=recipe.merge.images, seed=recipe.seed,
    )  # fmt: skip


def _drop(model: CapturedModel, images: ImageSet, size: int) -> Callable[[CapturedModel], float]:
    """Points of accuracy that a candidate loses beside the model, on the same images."""
    labels = images.labels
    assert labels is not None

    def accuracy(candidate: CapturedModel) -> float:
        found = top1_and_predictions(candidate.graph_module, images, size)
        return 100 * float((found == labels).double().mean())

    before = accuracy(model)
    return lambda candidate: before - accuracy(candidate)
