"""A recipe's recover section carried out: one recovery or several, plain or quantisation-aware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from deploykit.data import ImageSet, open_dataset
from deploykit.graph.capture import CapturedModel
from deploykit.progress import Steps
from deploykit.prune.recover import recover
from deploykit.prune.recover_gpusq import recover_gpusq
from deploykit.prune.recover_options import QatOptions, RecoverOptions
from deploykit.prune.recover_soup import recover_soup
from deploykit.recipe import Recipe
from deploykit.targets.device import cpu_facts
from deploykit.training_images import TrainingImages
from deploykit.types import Backbone, PassRecord

__all__ = ["fast_precision", "recovered", "training_set"]


def recovered(
    recipe: Recipe,
    student: CapturedModel,
    teacher: CapturedModel,
    folder: Path,
    steps: Steps,
) -> tuple[CapturedModel, Sequence[PassRecord]]:
    """The student after the recipe's training, and what was done.

    Args:
        folder: for checkpoints, from which an interrupted run goes on.

    Raises:
        UsageError: the images can't be used, or the model can't be trained.
        TargetMissingError: accelerate isn't installed.
    """
    section = recipe.recover
    images = TrainingImages(training_set(recipe, student.backbone))
    options = _options(recipe)
    if section.quantization_aware:
        return recover_gpusq(student, teacher, options, images, steps=steps, checkpoint=folder)
    if section.soup > 1:
        variants = [replace(options, seed=recipe.seed + n) for n in range(section.soup)]
        return recover_soup(
            student, teacher, variants, images,
            mode=section.soup_method, steps=steps, checkpoint=folder,
        )  # fmt: skip
    model, record = recover(student, teacher, options, images, steps=steps, checkpoint=folder)
    return model, [record]


def training_set(recipe: Recipe, backbone: Backbone) -> ImageSet:
    """What a model learns from, for its own preprocessing and number of classes.

    Raises:
        UsageError: the images can't be used.
    """
    section = recipe.recover
    assert section.data is not None
    return open_dataset(
        section.data,
        backbone.preprocessing,
        labelled="labels" in section.losses,
        num_classes=backbone.num_classes,
        seed=recipe.seed,
    )


def fast_precision() -> Literal["fp32", "bf16"]:
    """bf16 if this machine's GPU or processor multiplies in it, which halves a step's time."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = cpu_facts()[1]
    return "bf16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"


def _options(recipe: Recipe) -> RecoverOptions:
    section = recipe.recover
    trainings = 2 if section.quantization_aware else section.soup
    qat = None
    if section.quantization_aware:
        widths = recipe.quantize.widths
        qat = QatOptions(widths.weights, widths.activations, recipe.quantize.edge_bits)
    return RecoverOptions(
        losses=tuple(section.losses.items()),
        lr=section.learning_rate,
        precision=fast_precision() if section.precision == "auto" else section.precision,
        batch_size=section.batch_size,
        epochs=section.epochs,
        max_seconds=60 * section.minutes / trainings,
        qat=qat,
        workers=section.workers,
        seed=recipe.seed,
    )
