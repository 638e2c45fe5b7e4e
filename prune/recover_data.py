"""Images of a recovery: which are held out, in what order the others come, and their augmentation.

What step ``s`` sees depends on the seed and ``s`` alone, so a run that goes on after an
interruption sees what it would have seen, with any number of reading processes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from deploykit.errors import UsageError

__all__ = ["Augmented", "Order", "Plain", "check_images", "split"]

Images = Dataset[tuple[Tensor, int]]
_PRIME = 1_000_003


def split(count: int, share: float, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out, int64, disjoint and not empty.

    Raises:
        UsageError: fewer than two images.
    """
    if count < 2:
        raise UsageError(f"recover: wanted images to train on and to hold out, got {count}")
    held = min(max(1, round(count * share)), most, count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


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

    def __init__(self, images: Images, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        mixed = ((self.seed * _PRIME + epoch) * _PRIME + index) % 2**63
        before = random.getstate()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed)
            random.seed(mixed)
            try:
                return self.images[index]
            finally:
                random.setstate(before)


class Plain(Dataset[tuple[Tensor, int]]):
    """The held-out images as they are when a model is evaluated.

    Args:
        images: its ``evaluation()``, where it has that method, gives the images without
            augmentation.
    """

    def __init__(self, images: Images, indices: Tensor) -> None:
        plain = getattr(images, "evaluation", None)
        self.images: Images = images if plain is None else plain()
        self.indices = indices.tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.images[self.indices[place]]


def check_images(images: Images, size: int) -> int:
    """How many there are.

    Raises:
        UsageError: none, or the first isn't (float32 (3, size, size), label).
    """
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
