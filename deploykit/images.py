"""Which images a run calibrates on and verifies with: the user's, or synthetic ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deploykit.data import ImageSet, open_dataset
from deploykit.errors import UsageError
from deploykit.graph.execute import take
from deploykit.synthetic import synthetic_images
from deploykit.types import Backbone, Preprocessing

__all__ = ["Images", "calibration_images", "labelled_images", "verification_images"]


@dataclass(frozen=True)
class Images:
    """Images without labels, in a fixed order.

    Attributes:
        batches: ``batches(n)`` iterates over float32 (n, 3, S, S), from the start each time.
    """

    description: str
    count: int
    batches: Callable[[int], Iterator[Tensor]]


def _synthetic(backbone: Backbone, count: int, seed: int) -> Images:
    images = synthetic_images(count, backbone.preprocessing, seed)
    return Images(f"synthetic, {count} images", count, lambda size: iter(images.split(size)))


def _from_set(images: ImageSet) -> Images:
    def batches(size: int) -> Iterator[Tensor]:
        return (batch for batch, _ in images.tensor_batches(size))

    return Images(images.description, len(images), batches)


def calibration_images(
    path: Path | None,
    backbone: Backbone,
    count: int,
    seed: int,
    classes: Sequence[int] | None = None,
) -> Images:
    """``count`` images of the folder (all, if it has fewer), or synthetic ones without a folder.

    Args:
        classes: images of these classes only, where the folder tells classes.

    Raises:
        UsageError: the folder can't be used.
    """
    if path is None:
        return _synthetic(backbone, count, seed)
    own = None
    if classes is not None:
        own = labelled_images(path, backbone.preprocessing, backbone.num_classes, classes)
    if own is not None:
        step = max(len(own) // count, 1)
        return _from_set(own.subset(range(0, len(own), step)[:count]))
    found = open_dataset(path, backbone.preprocessing, labelled=False, limit=count, seed=seed)
    return _from_set(found)


def labelled_images(
    path: Path,
    preprocessing: Preprocessing,
    num_classes: int,
    classes: Sequence[int] | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet | None:
    """The folder's images if they carry labels the model knows (of ``classes``: any), else None.

    For uses that images without labels serve, too.
    """
    try:
        found = open_dataset(
            path, preprocessing, labelled=True, num_classes=num_classes, limit=limit, seed=seed
        )
        return found if classes is None else found.of_classes(classes)
    except UsageError:
        return None


def verification_images(evaluation: ImageSet | None, calibration: Images, count: int) -> Images:
    """``count`` images for parity: spread over the labelled ones, else the calibration images."""
    if evaluation is None:
        wanted = min(count, calibration.count)
        first = torch.cat(take(calibration.batches(wanted), wanted))
        text = f"first {wanted} of {calibration.description}"
        return Images(text, wanted, lambda size: iter(first.split(size)))
    step = max(len(evaluation) // count, 1)
    chosen = evaluation.subset(range(0, len(evaluation), step)[:count])
    return _from_set(chosen)
