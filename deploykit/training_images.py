"""Images to learn from: a folder's or a pack's, each time cropped and flipped anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from deploykit._compat import torchvision
from deploykit.data import ImageSet, evaluation_transform
from deploykit.types import Preprocessing

__all__ = ["TrainingImages"]

transforms = torchvision.transforms


@dataclass(frozen=True, eq=False)
class TrainingImages(Dataset[tuple[Tensor, int]]):
    """Items (float32 (3, S, S), label), -1 where the images carry no labels.

    Augmentation takes its random numbers from torch's generator, so whoever seeds that decides
    them. Can be pickled, for reading in other processes.

    Attributes:
        images: what ``open_dataset`` opened.
        augment: random resized crops and flips; else the images as they are evaluated.
        smallest_crop: share of an image's area that a crop covers at least.
    """

    images: ImageSet
    augment: bool = True
    smallest_crop: float = 0.35

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        labels = self.images.labels
        label = -1 if labels is None else int(labels[index])
        return self._prepare(self.images.picture(index)), label

    def evaluation(self) -> TrainingImages:
        """The same images without augmentation."""
        return TrainingImages(self.images, augment=False, smallest_crop=self.smallest_crop)

    @cached_property
    def _prepare(self) -> Callable[[Image.Image], Tensor]:
        preprocessing = self.images.preprocessing
        if not self.augment:
            return evaluation_transform(preprocessing)
        return augmenting_transform(preprocessing, self.smallest_crop)


def augmenting_transform(
    preprocessing: Preprocessing, smallest_crop: float
) -> Callable[[Image.Image], Tensor]:
    """Random resized crop and horizontal flip, normalised as in evaluation."""
    mode = transforms.InterpolationMode(preprocessing.interpolation)
    made: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                preprocessing.size, scale=(smallest_crop, 1.0), interpolation=mode
            ),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    return made
