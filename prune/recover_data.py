"""Images of a recovery: which are held out, in what order the others come, and their augmentation.

What step ``s`` sees depends on the seed and ``s`` alone, so a run that goes on after an
interruption sees what it would have seen, with any number of reading processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from deploykit.errors import UsageError
from deploykit.prune.recover_options import RecoverOptions
from deploykit.types import Backbone

__all__ = ["Augmented", "Images", "Order", "Plain", "Split", "split"]

Images = Dataset[tuple[Tensor, int]]
_PRIME = 1_000_003


@dataclass(frozen=True)
class Split:
    """The images, and which of them are for what.

    Attributes:
        train, held_out: indices, int64, disjoint and not empty.
        classes: how many the model has.
    """

    images: Images
    train: Tensor
    held_out: Tensor
    classes: int
    options: RecoverOptions

    @property
    def count(self) -> int:
        return len(self.train) + len(self.held_out)

    def batches(self, first: int, last: int) -> DataLoader[Any]:
        """Training images ``first`` to ``last`` of the endless order, augmented."""
        options = self.options
        order = Order(self.train, options.seed, first, last)
        return DataLoader(
            Augmented(self.images, options.seed, self.classes),
            batch_sampler=BatchSampler(order, options.batch_size, drop_last=False),
            num_workers=options.workers,
        )

    def judged(self, process: int, processes: int) -> DataLoader[Any]:
        """One process's share of the held-out images."""
        options = self.options
        mine = Plain(self.images, self.held_out[process::processes], self.classes)
        return DataLoader(mine, options.batch_size, num_workers=options.workers)

    def calibration(self, batches: int) -> list[Tensor]:
        """Some training batches without augmentation, the same for a seed."""
        size = self.options.batch_size
        generator = torch.Generator().manual_seed(self.options.seed)
        order = self.train[torch.randperm(len(self.train), generator=generator)]
        chosen = Plain(self.images, order[: batches * size], self.classes)
        return [batch for batch, _ in DataLoader(chosen, size)]


def split(images: Images, backbone: Backbone, options: RecoverOptions) -> Split:
    """Set images aside that are never trained on.

    Raises:
        UsageError: fewer than two images, or the first isn't (float (3, size, size), label).
    """
    count = _check_images(images, backbone.preprocessing.size)
    if count < 2:
        raise UsageError(f"recover: wanted images to train on and to hold out, got {count}")
    held = min(max(1, round(count * options.held_out)), options.held_out_images, count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(options.split_seed))
    train, held_out = order[held:].sort().values, order[:held].sort().values
    return Split(images, train, held_out, backbone.num_classes, options)


class Order(Sampler[Any]):
    """Endless epochs in fresh random orders, cut to a number of images.

    Yields (epoch, index): the epoch goes with it so that each has its own augmentation.
    """

    def __init__(self, indices: Tensor, seed: int, first: int, last: int) -> None:
        self.indices, self.seed, self.first, self.last = indices, seed, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        count, epoch, order = len(self.indices), -1, self.indices
        for place in range(self.first, self.last):
            if place // count != epoch:
                epoch = place // count
                generator = torch.Generator().manual_seed(self.seed * _PRIME + epoch)
                order = self.indices[torch.randperm(count, generator=generator)]
            yield epoch, int(order[place % count])


class Augmented(Dataset[tuple[Tensor, int]]):
    """The training images by (epoch, index), each with random numbers of its own."""

    def __init__(self, images: Images, seed: int, classes: int) -> None:
        self.images, self.seed, self.classes = images, seed, classes

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        mixed = ((self.seed * _PRIME + epoch) * _PRIME + index) % 2**63
        before = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed)
            random.seed(mixed)
            try:
                return _checked(self.images[index], self.classes)
            finally:
                random.setstate(before)


class Plain(Dataset[tuple[Tensor, int]]):
    """The held-out images as they are when a model is evaluated.

    Args:
        images: its ``evaluation()``, where it has that method, gives the images without
            augmentation.
    """

    def __init__(self, images: Images, indices: Tensor, classes: int) -> None:
        plain = getattr(images, "evaluation", None)
        self.images: Images = images if plain is None else plain()
        self.indices, self.classes = indices.tolist(), classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return _checked(self.images[self.indices[place]], self.classes)


def _checked(item: tuple[Tensor, int], classes: int) -> tuple[Tensor, int]:
    image, label = item
    if not -1 <= label < classes:
        raise UsageError(f"recover: an image has label {label}, the model has {classes} classes")
    return image, int(label)


def _check_images(images: Images, size: int) -> int:
    """How many there are."""
    sized: Any = images
    count = len(sized)
    if count == 0:
        raise UsageError("recover: no images to train on")
    item = images[0]
    image = item[0] if isinstance(item, tuple) and len(item) == 2 else None
    if (
        not isinstance(image, Tensor)
        or image.shape != (3, size, size)
        or not image.is_floating_point()
    ):
        got = type(item).__name__ if not isinstance(image, Tensor) else tuple(image.shape)
        raise UsageError(f"recover: wanted (float (3, {size}, {size}), label) items, got {got}")
    return count
