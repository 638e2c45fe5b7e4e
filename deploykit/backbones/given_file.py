"""What files that hold structure and weights have in common as backbones."""

from __future__ import annotations

from pathlib import Path

from deploykit.errors import UsageError
from deploykit.recipe import ModelSection
from deploykit.types import Preprocessing

__all__ = ["assumed_preprocessing", "refuse_options"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def refuse_options(path: Path, model: ModelSection, classes: int | None = None) -> None:
    """A file has its own weights and its own number of classes.

    Raises:
        UsageError: the recipe asks for others.
    """
    if model.weights != "auto":
        message = f"--model {path} holds its weights, but weights {model.weights} were asked for"
        raise UsageError(f"{message}; leave them out")
    if None not in (model.num_classes, classes) and model.num_classes != classes:
        message = f"--model {path} has {classes} outputs, but num_classes is {model.num_classes}"
        raise UsageError(f"{message}; leave it out")


def assumed_preprocessing(path: Path, size: int, notes: list[str]) -> Preprocessing:
    """ImageNet's usual normalisation, and a note that says so."""
    notes.append(
        f"{path.name} doesn't say how images are normalised: ImageNet's mean and std and a crop "
        f"of 0.875 are assumed; give model.preprocessing in a recipe if it is otherwise"
    )
    return Preprocessing(size=size, crop_pct=0.875, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
