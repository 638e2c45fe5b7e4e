"""Images, as the network is fed with them: folders and packs.

Images are prepared by timm's own evaluation transform, so that an accuracy measured here is the
accuracy of the model as it was published.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import zipfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from deploykit._compat import timm
from deploykit.errors import UsageError
from deploykit.types import Preprocessing

__all__ = ["ImageSet", "evaluation_transform", "open_dataset"]

_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
)
_LABELS_FILE = "labels.json"
_WORDNET = re.compile(r"^n\d{8}$")
_MAX_PIXELS = 89_478_485  # PIL's own limit for a suspicious image, a quarter GiB of RGB
_MAX_PACK_BYTES = 4 << 30
_MAX_PACK_RATIO = 200  # real image packs compress by a few times, zip bombs by a thousand
_WORKERS = min(4, os.cpu_count() or 1)
_LOOKAHEAD_IMAGES = 64


@dataclass(frozen=True)
class ImageSet:
    """A fixed sequence of images, prepared on demand.

    ``labels`` is int64 (N,), or None where the images carry none. ``description`` says what was
    used, for reports: ``imagenette/val, 1000 images``.
    """

    description: str
    labels: Tensor | None
    preprocessing: Preprocessing
    _load: Callable[[int], Image.Image]
    _count: int

    def __len__(self) -> int:
        return self._count

    def picture(self, index: int) -> Image.Image:
        """An image as it is in its file, RGB."""
        return self._load(index)

    def subset(self, chosen: Sequence[int]) -> ImageSet:
        """Some of the images, in the order given."""
        indices = list(chosen)
        return ImageSet(
            f"{len(indices)} of {self.description}",
            None if self.labels is None else self.labels[indices],
            self.preprocessing,
            partial(_chosen, self._load, indices),
            len(indices),
        )

    def of_classes(self, classes: Sequence[int]) -> ImageSet:
        """The images of some classes; a class's label becomes its place among them.

        Raises:
            UsageError: there is no image of any of them.
        """
        assert self.labels is not None
        place = {label: index for index, label in enumerate(classes)}
        chosen = [i for i, label in enumerate(self.labels.tolist()) if label in place]
        if not chosen:
            raise UsageError(f"{self.description}: no image of the {len(place)} classes asked for")
        kept = self.subset(chosen)
        labels = torch.tensor([place[label] for label in self.labels[chosen].tolist()])
        return replace(kept, labels=labels)

    def tensor_batches(
        self, batch_size: int
    ) -> Generator[tuple[Tensor, Tensor | None], None, None]:
        """Yield (float32 (n, 3, S, S), int64 (n,) or None) in order; the last may be smaller.

        A few threads decode ahead, holding at most 64 prepared images and one batch beyond.

        Raises:
            UsageError: an image can't be read; names the file.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        prepare = evaluation_transform(self.preprocessing)
        pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="deploykit-images")
        waiting: deque[Future[Tensor]] = deque()
        indices = iter(range(self._count))

        def work(index: int) -> Tensor:
            image: Tensor = prepare(self._load(index))
            return image

        try:
            ahead = min(max(batch_size, 2 * _WORKERS), _LOOKAHEAD_IMAGES)
            waiting.extend(pool.submit(work, i) for i in itertools.islice(indices, ahead))
            for start in range(0, self._count, batch_size):
                images = []
                for _ in range(min(batch_size, self._count - start)):
                    images.append(waiting.popleft().result())
                    waiting.extend(pool.submit(work, i) for i in itertools.islice(indices, 1))
                labels = self.labels
                stop = start + len(images)
                yield torch.stack(images), None if labels is None else labels[start:stop]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def open_dataset(
    path: Path,
    preprocessing: Preprocessing,
    *,
    labelled: bool,
    num_classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageSet:
    """Open a folder or a pack of images.

    Understood are: a folder of class folders (WordNet ids mean ImageNet classes where the model
    has 1000; folders named 0, 1, 2 … are class numbers; otherwise classes in sorted order), a
    folder of images with ``labels.json`` (``{file: class}`` or ``{file: [class, name]}``), a
    folder of images without labels, and an ``.npz`` with ``images`` uint8 (N, H, W) or
    (N, H, W, 3) and ``labels`` (N,).

    ``limit`` takes a subset that is balanced over the classes and depends on ``seed`` alone.

    Raises:
        UsageError: missing, empty or unreadable; no labels although ``labelled``; a class the
            model doesn't have.
    """
    path = path.expanduser()
    if not path.exists():
        raise UsageError(f"data {path}: no such file or folder")
    if path.is_file():
        load, count, labels = _open_pack(path)
    else:
        load, count, labels = _open_folder(path, num_classes, labelled)
    place = "/".join(path.resolve().parts[-2:]).lstrip("/")
    if count == 0:
        raise UsageError(f"data {path}: no images in it ({', '.join(sorted(_SUFFIXES))})")
    if labelled and labels is None:
        message = (
            f"data {path}: images without labels, but accuracy needs them; put them into a folder "
            f"per class, or write {_LABELS_FILE} with {{file: class}}"
        )
        raise UsageError(message)
    if labels is not None:
        _check_labels(labels, num_classes if labelled else None, path)
    if limit is not None and limit < count:
        chosen = _balanced(labels, count, limit, seed)
        labels = None if labels is None else labels[chosen]
        description = f"{place}, {limit} of {count} images (seed {seed})"
        load = partial(_chosen, load, chosen)
        return ImageSet(description, _as_tensor(labels), preprocessing, load, limit)
    return ImageSet(f"{place}, {count} images", _as_tensor(labels), preprocessing, load, count)


_Labels = NDArray[np.int64]
_Opened = tuple[Callable[[int], Image.Image], int, _Labels | None]


def _as_tensor(labels: _Labels | None) -> Tensor | None:
    return None if labels is None else torch.from_numpy(labels.astype(np.int64))


def _check_labels(labels: _Labels, num_classes: int | None, path: Path) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise UsageError(f"data {path}: class {low} is negative; classes count from 0")
    if num_classes is not None and high >= num_classes:
        message = (
            f"data {path}: class {high}, but the model has {num_classes} classes "
            f"(0 to {num_classes - 1}); use the model's own classes"
        )
        raise UsageError(message)


def _balanced(labels: _Labels | None, count: int, limit: int, seed: int) -> list[int]:
    """Sorted indices of ``limit`` images, as evenly over the classes as they allow."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    if labels is None:
        return sorted(int(i) for i in order[:limit])
    shuffled = labels[order]
    by_class = np.argsort(shuffled, kind="stable")
    _, starts, sizes = np.unique(shuffled[by_class], return_index=True, return_counts=True)
    turn = np.empty(count, dtype=np.int64)  # an image's place among its class's images
    turn[by_class] = np.arange(count) - np.repeat(starts, sizes)
    taken = order[np.argsort(turn, kind="stable")[:limit]]
    return sorted(int(i) for i in taken)


def _open_folder(path: Path, num_classes: int | None, labelled: bool) -> _Opened:
    labels_file = path / _LABELS_FILE
    if labels_file.is_file():
        files, labels = _read_labels(labels_file)
        return _file_loader(files), len(files), labels
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    per_folder = [(folder, _images_in(folder.rglob("*"))) for folder in folders]
    per_folder = [(folder, files) for folder, files in per_folder if files]
    if not per_folder:
        files = _images_in(path.iterdir())
        return _file_loader(files), len(files), None
    loose = _images_in(path.iterdir())
    if loose and labelled:
        message = f"data {path}: class folders, but also {len(loose)} images beside them"
        raise UsageError(f"{message}; move {loose[0].name} into its class's folder")
    names = [folder.name for folder, _ in per_folder]
    every = [file for _, files in per_folder for file in files]
    if not labelled:
        return _file_loader(loose + every), len(loose) + len(every), None
    classes = _class_numbers(names, num_classes, path)
    counts = [len(files) for _, files in per_folder]
    return _file_loader(every), len(every), np.repeat(np.array(classes, np.int64), counts)


def _images_in(paths: Iterator[Path]) -> list[Path]:
    return sorted(
        p
        for p in paths
        if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


@cache
def _imagenet_classes() -> dict[str, int]:
    return {name: i for i, name in enumerate(timm.data.ImageNetInfo().label_names())}


def _class_numbers(names: list[str], num_classes: int | None, path: Path) -> list[int]:
    """The class of each folder name."""
    if num_classes == 1000 and all(_WORDNET.match(name) for name in names):
        known = _imagenet_classes()
        strange = [name for name in names if name not in known]
        if strange:
            message = (
                f"data {path}: {len(strange)} folders aren't ImageNet-1k classes ({strange[0]})"
            )
            raise UsageError(f"{message}; take them out or use another model")
        return [known[name] for name in names]
    if all(name.isdecimal() for name in names):
        numbers = [int(name) for name in names]
        if len(set(numbers)) == len(numbers) and max(numbers) < (num_classes or len(numbers)):
            return numbers
        ranks = {number: rank for rank, number in enumerate(sorted(set(numbers)))}
        ordered = [ranks[number] for number in numbers]
    else:
        ordered = list(range(len(names)))
    if num_classes is not None and len(names) != num_classes:
        message = (
            f"data {path}: {len(names)} class folders, but the model has {num_classes} classes; "
            f"one folder per class, or name the folders by class number, or write {_LABELS_FILE}"
        )
        raise UsageError(message)
    return ordered


def _read_labels(file: Path) -> tuple[list[Path], _Labels]:
    try:
        table = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"data {file}: not readable as JSON ({error})") from error
    if not isinstance(table, dict) or not table:
        raise UsageError(f"data {file}: wanted {{file: class}}, got {type(table).__name__} or none")
    root = file.parent
    files, classes = [], []
    for name in sorted(table):
        value = table[name]
        number = value[0] if isinstance(value, list) and value else value
        if not isinstance(number, int) or isinstance(number, bool) or abs(number) >= 2**31:
            message = f"data {file}: {name!r}: wanted a class number or [number, name]"
            raise UsageError(f"{message}, got {value!r}"[:400])
        image = root / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UsageError(f"data {file}: {name!r} lies outside the folder")
        if not image.is_file():
            raise UsageError(f"data {file}: names {name!r}, which isn't there")
        files.append(image)
        classes.append(number)
    return files, np.array(classes, dtype=np.int64)


def _file_loader(files: Sequence[Path]) -> Callable[[int], Image.Image]:
    return partial(_load_file, files)  # not a closure: other processes may have to read it


def _chosen(load: Callable[[int], Image.Image], indices: Sequence[int], index: int) -> Image.Image:
    return load(indices[index])


def _load_file(files: Sequence[Path], index: int) -> Image.Image:
    file = files[index]
    try:
        with Image.open(file) as image:
            if image.width * image.height > _MAX_PIXELS:
                size = f"{image.width}×{image.height}"
                raise UsageError(f"image {file}: {size} pixels is too large; scale it down")
            return image.convert("RGB")
    except UsageError:
        raise
    except Image.DecompressionBombError as error:
        raise UsageError(f"image {file}: too many pixels; scale it down") from error
    except Exception as error:  # damaged files fail in every decoder's own way
        message = f"image {file}: can't be read ({type(error).__name__}: {error})"
        raise UsageError(f"{message}; replace or remove it") from error


def _open_pack(path: Path) -> _Opened:
    if path.suffix.lower() != ".npz":
        raise UsageError(f"data {path}: a folder of images or an .npz pack is wanted")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        size = sum(e.file_size for e in entries)
        packed = sum(e.compress_size for e in entries)
        if size > _MAX_PACK_BYTES or (size > 1 << 26 and size > _MAX_PACK_RATIO * packed):
            raise UsageError(f"data {path}: unpacks to {size >> 20} MiB; refused, split it")
        with np.load(path, allow_pickle=False) as pack:
            arrays: dict[str, Any] = {k: pack[k] for k in ("images", "labels") if k in pack.files}
    except UsageError:
        raise
    except Exception as error:  # zip, header and pickle refusals alike
        message = f"data {path}: not a readable .npz of plain arrays ({error})"
        raise UsageError(" ".join(message.split())) from error
    images, labels = arrays.get("images"), arrays.get("labels")
    shape = None if images is None else images.shape
    if images is None or images.dtype != np.uint8 or not _is_image_shape(images.shape):
        got = "none" if images is None else f"{images.dtype} {shape}"
        message = f"data {path}: wanted 'images' uint8 (N, H, W) or (N, H, W, 3), got {got}"
        raise UsageError(message)
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        message = (
            f"data {path}: wanted 'labels' integers ({len(images)},), "
            f"got {labels.dtype} {labels.shape}"
        )
        raise UsageError(message)

    load = partial(_from_pack, images)
    return load, len(images), None if labels is None else labels.astype(np.int64)


def _from_pack(images: NDArray[np.uint8], index: int) -> Image.Image:
    return Image.fromarray(images[index]).convert("RGB")


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    colour = len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)
    return colour and min(shape[1:3]) > 0


def evaluation_transform(preprocessing: Preprocessing) -> Callable[[Image.Image], Tensor]:
    """What makes an image the network's input for evaluation, float32 (3, S, S)."""
    transform: Callable[[Image.Image], Tensor] = timm.data.create_transform(
        input_size=(3, preprocessing.size, preprocessing.size),
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        crop_pct=preprocessing.crop_pct,
        crop_mode="center",
    )
    return transform
