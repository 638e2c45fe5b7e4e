"""A recipe's recover section carried out: one recovery or several, plain or quantisation-aware."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from deploykit.data import open_dataset
from deploykit.graph.capture import CapturedModel
from deploykit.progress import Steps
from deploykit.prune.recover import recover
from deploykit.prune.recover_data import split
from deploykit.prune.recover_gpusq import recover_gpusq
from deploykit.prune.recover_options import QatOptions, RecoverOptions
from deploykit.prune.soup import soup
from deploykit.recipe import Recipe
from deploykit.training_images import TrainingImages
from deploykit.types import PassRecord

__all__ = ["recovered"]


def recovered(
    recipe: Recipe,
    student: CapturedModel,
    teacher: CapturedModel,
    folder: Path,
    steps: Steps,
) -> tuple[CapturedModel, list[PassRecord]]:
    """The student after the recipe's training, and what was done.

    Args:
        folder: for checkpoints, from which an interrupted run goes on.

    Raises:
        UsageError: the images can't be used, or the model can't be trained.
        TargetMissingError: accelerate isn't installed.
    """
    section = recipe.recover
    assert section.data is not None
    images = TrainingImages(
        open_dataset(
            section.data,
            student.backbone.preprocessing,
            labelled="labels" in section.losses,
            num_classes=student.backbone.num_classes,
            seed=recipe.seed,
        )
    )
    options = _options(recipe)
    made: list[CapturedModel] = []
    records: list[PassRecord] = []
    for number in range(section.soup):
        own = replace(options, seed=recipe.seed + number)
        place = folder / f"recovery-{number}"
        if section.quantization_aware:
            model, both = recover_gpusq(
                student, teacher, own, images, steps=steps, checkpoint=place
            )
            records += both
        else:
            model, record = recover(student, teacher, own, images, steps=steps, checkpoint=place)
            records.append(record)
        made.append(model)
    if len(made) == 1:
        return made[0], records
    model, record = soup(made, section.soup_method, _agreement(teacher, images, options))
    return model, [*records, record]


def _options(recipe: Recipe) -> RecoverOptions:
    section = recipe.recover
    trainings = section.soup * (2 if section.quantization_aware else 1)
    qat = None
    if section.quantization_aware:
        widths = recipe.quantize.widths
        qat = QatOptions(widths.weights, widths.activations, recipe.quantize.edge_bits)
    return RecoverOptions(
        losses=tuple(section.losses.items()),
        lr=section.learning_rate,
        batch_size=section.batch_size,
        epochs=section.epochs,
        max_seconds=60 * section.minutes / trainings,
        qat=qat,
        workers=section.workers,
    )


def _agreement(
    teacher: CapturedModel, images: TrainingImages, options: RecoverOptions
) -> Callable[[CapturedModel], float]:
    """Percent of the held-out images on which a model answers as the teacher does."""
    parts = split(images, teacher.backbone, options)

    @torch.no_grad()
    def answers(model: CapturedModel) -> Tensor:
        return torch.cat([model.graph_module(batch).argmax(1) for batch, _ in parts.judged(0, 1)])

    wanted = answers(teacher)
    return lambda model: 100 * float((answers(model) == wanted).double().mean())
