"""Images: every layout, the exact preparation, and what is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deploykit._compat import timm
from deploykit.data import ImageSet, open_dataset
from deploykit.errors import UsageError
from deploykit.synthetic import synthetic_images
from deploykit.types import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = Preprocessing(size=16, crop_pct=0.875, mean=MEAN, std=STD)


def picture(path: Path, seed: int, size: tuple[int, int] = (30, 24)) -> None:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def class_folders(root: Path, names: list[str], each: int = 3) -> Path:
    for i, name in enumerate(names):
        for j in range(each):
            picture(root / name / f"{j}.png", seed=i * 100 + j)
    return root


def everything(images: ImageSet, batch_size: int = 4) -> tuple[Tensor, Tensor | None]:
    batches = list(images.tensor_batches(batch_size))
    stacked = torch.cat([x for x, _ in batches])
    labels = [y for _, y in batches]
    if labels[0] is None:
        return stacked, None
    return stacked, torch.cat([y for y in labels if y is not None])


def test_class_folders_in_sorted_order(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "pets" / "val", ["dog", "ant", "cat"])
    (root / "ant" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    images = open_dataset(root, SMALL, labelled=True, num_classes=3)
    assert len(images) == 9
    assert images.description == "pets/val, 9 images"
    assert images.labels is not None and images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    tensors, labels = everything(images)
    assert tensors.shape == (9, 3, 16, 16) and tensors.dtype == torch.float32
    assert labels is not None and torch.equal(labels, images.labels)


def test_wordnet_folders_mean_imagenet_classes_for_a_1000_class_model(tmp_path: Path) -> None:
    root = class_folders(tmp_path, ["n01440764", "n03888257"], each=1)
    thousand = open_dataset(root, SMALL, labelled=True, num_classes=1000)
    assert thousand.labels is not None and thousand.labels.tolist() == [0, 701]
    two = open_dataset(root, SMALL, labelled=True, num_classes=2)
    assert two.labels is not None and two.labels.tolist() == [0, 1]


def test_numbered_folders_are_class_numbers(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "a", ["10", "2", "007"], each=1)
    images = open_dataset(root, SMALL, labelled=True, num_classes=20)
    assert images.labels is not None and sorted(images.labels.tolist()) == [2, 7, 10]
    from_one = class_folders(tmp_path / "b", [str(i) for i in range(1, 11)], each=1)
    images = open_dataset(from_one, SMALL, labelled=True, num_classes=10)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 9, *range(1, 9)]  # folders sort as text, classes don't


@pytest.mark.parametrize("value", [3, [3, "newt"]])
def test_labels_json(tmp_path: Path, value: object) -> None:
    picture(tmp_path / "b.png", 1)
    picture(tmp_path / "sub" / "a.png", 2)
    (tmp_path / "labels.json").write_text(json.dumps({"b.png": value, "sub/a.png": 0}))
    images = open_dataset(tmp_path, SMALL, labelled=True, num_classes=10)
    assert images.labels is not None and images.labels.tolist() == [3, 0]


def test_a_flat_folder_serves_for_calibration_only(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    images = open_dataset(tmp_path, SMALL, labelled=False)
    assert len(images) == 3 and images.labels is None
    assert everything(images)[1] is None
    with pytest.raises(UsageError, match="without labels"):
        open_dataset(tmp_path, SMALL, labelled=True, num_classes=3)


@pytest.mark.parametrize("shape", [(5, 20, 20), (5, 20, 20, 3)])
def test_a_pack(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    np.savez_compressed(tmp_path / "pack.npz", images=values, labels=np.arange(5))
    images = open_dataset(tmp_path / "pack.npz", SMALL, labelled=True, num_classes=5)
    tensors, labels = everything(images)
    assert tensors.shape == (5, 3, 16, 16)
    assert labels is not None and labels.tolist() == [0, 1, 2, 3, 4]
    assert images.description.endswith("/pack.npz, 5 images")


def test_a_pack_equals_the_same_images_as_files(tmp_path: Path) -> None:
    class_folders(tmp_path / "files", ["0", "1"], each=2)
    files = sorted((tmp_path / "files").rglob("*.png"))
    values = np.stack([np.asarray(Image.open(f)) for f in files])
    np.savez(tmp_path / "p.npz", images=values, labels=np.array([0, 0, 1, 1], np.uint8))
    from_files, _ = everything(open_dataset(tmp_path / "files", SMALL, labelled=True))
    from_pack, _ = everything(open_dataset(tmp_path / "p.npz", SMALL, labelled=True))
    assert torch.equal(from_files, from_pack)


@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_preparation_is_timms_own(tmp_path: Path, crop_pct: float, interpolation: str) -> None:
    preprocessing = Preprocessing.model_validate(
        {
            "size": 22,
            "crop_pct": crop_pct,
            "interpolation": interpolation,
            "mean": MEAN,
            "std": STD,
        }
    )
    picture(tmp_path / "wide.png", 1, (61, 40))
    picture(tmp_path / "tall.png", 2, (19, 53))
    Image.new("L", (33, 27), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (20, 20), (9, 8, 7, 100)).save(tmp_path / "alpha.png")
    expected_of = timm.data.create_transform(
        (3, 22, 22), crop_pct=crop_pct, interpolation=interpolation, mean=MEAN, std=STD
    )
    got, _ = everything(open_dataset(tmp_path, preprocessing, labelled=False))
    for tensor, file in zip(got, sorted(tmp_path.glob("*.png")), strict=True):
        assert torch.equal(tensor, expected_of(Image.open(file).convert("RGB")))


def test_batches_keep_the_order_and_stop_their_threads(tmp_path: Path) -> None:
    for i in range(23):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / f"{i:02}.png")
    images = open_dataset(tmp_path, SMALL, labelled=False)
    one, _ = everything(images, 1)
    many, _ = everything(images, 50)
    assert torch.equal(one, many)
    level = many[:, 0, 0, 0] * 0.229 + 0.485
    assert torch.allclose(level * 255, torch.arange(23.0), atol=1e-3)
    sizes = [len(x) for x, _ in images.tensor_batches(8)]
    assert sizes == [8, 8, 7]
    abandoned = images.tensor_batches(2)
    next(abandoned)
    abandoned.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("deploykit-images")]


def test_a_limit_is_balanced_seeded_and_stable(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(4), [50, 10, 10, 3])
    np.savez(tmp_path / "p.npz", images=np.zeros((73, 8, 8), np.uint8), labels=labels)

    def chosen(limit: int, seed: int = 0) -> ImageSet:
        return open_dataset(tmp_path / "p.npz", SMALL, labelled=True, limit=limit, seed=seed)

    twelve = chosen(12)
    assert twelve.labels is not None and len(twelve) == 12
    assert torch.bincount(twelve.labels).tolist() == [3, 3, 3, 3]
    assert twelve.description.endswith("12 of 73 images (seed 0)")
    again, full = chosen(24), chosen(500)
    assert again.labels is not None and full.labels is not None
    assert torch.bincount(again.labels).tolist() == [7, 7, 7, 3]
    assert len(full) == 73 and full.description.endswith("73 images")
    assert torch.equal(again.labels, chosen(24).labels)  # type: ignore[arg-type]
    assert len(chosen(2)) == 2


def test_a_limit_takes_the_same_images_for_the_same_seed(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    a, b, c = (
        everything(open_dataset(tmp_path, SMALL, labelled=False, limit=6, seed=s))[0]
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def mistake(kind: str, root: Path) -> Path:
    if kind == "missing":
        return root / "nowhere"
    if kind == "empty":
        return root
    if kind == "too many folders":
        return class_folders(root, ["a", "b", "c"])
    if kind == "strange wordnet":
        return class_folders(root, ["n01440764", "n99999999"])
    if kind == "loose":
        picture(root / "x.png", 0)
        return class_folders(root, ["a", "b"])
    if kind.startswith("labels "):
        picture(root / "a.png", 0)
        tables = {
            "labels broken": "{",
            "labels list": "[1]",
            "labels text": '{"a.png": "cat"}',
            "labels bool": '{"a.png": true}',
            "labels high": '{"a.png": 2}',
            "labels negative": '{"a.png": -1}',
            "labels absent": '{"b.png": 1}',
            "labels outside": '{"../a.png": 1}',
            "labels deep": "[" * 200_000,
        }
        (root / "labels.json").write_text(tables[kind])
        return root
    pack = root / "p.npz"
    good = np.zeros((3, 8, 8), np.uint8)
    if kind == "pack code":
        np.savez(pack, images=good, labels=np.array([{}, {}, {}], dtype=object))
    elif kind == "pack float":
        np.savez(pack, images=good.astype(np.float32))
    elif kind == "pack shape":
        np.savez(pack, images=np.zeros((3, 8, 8, 4), np.uint8))
    elif kind == "pack labels":
        np.savez(pack, images=good, labels=np.zeros(4, np.int64))
    elif kind == "pack nothing":
        np.savez(pack, pictures=good)
    elif kind == "pack bomb":
        np.savez_compressed(pack, images=np.zeros((1, 9000, 9000), np.uint8))
    elif kind == "pack cut":
        np.savez(pack, images=good)
        pack.write_bytes(pack.read_bytes()[:100])
    else:
        pack = root / "readme.txt"
        pack.write_text("x")
    return pack


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("missing", "no such file or folder"),
        ("empty", "no images"),
        ("too many folders", "3 class folders, but the model has 2"),
        ("loose", "images beside them"),
        ("labels broken", "not readable as JSON"),
        ("labels list", "wanted {file: class}"),
        ("labels text", "class number"),
        ("labels bool", "class number"),
        ("labels high", "class 2, but the model has 2 classes"),
        ("labels negative", "negative"),
        ("labels absent", "isn't there"),
        ("labels outside", "outside"),
        ("labels deep", "not readable as JSON"),
        ("pack code", "plain arrays"),
        ("pack float", "wanted 'images' uint8"),
        ("pack shape", "wanted 'images' uint8"),
        ("pack labels", "wanted 'labels' integers"),
        ("pack nothing", "got none"),
        ("pack bomb", "refused"),
        ("pack cut", "not a readable .npz"),
        ("text file", "a folder of images or an .npz"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, kind: str, told: str) -> None:
    path = mistake(kind, tmp_path)
    with pytest.raises(UsageError, match=told) as caught:
        open_dataset(path, SMALL, labelled=True, num_classes=2)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_strange_wordnet_folder_is_named(tmp_path: Path) -> None:
    root = mistake("strange wordnet", tmp_path)
    with pytest.raises(UsageError, match="n99999999"):
        open_dataset(root, SMALL, labelled=True, num_classes=1000)


@pytest.mark.parametrize("damage", ["cut", "text", "bomb"])
def test_a_bad_image_is_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    bad = tmp_path / "1.png"
    if damage == "cut":
        bad.write_bytes(bad.read_bytes()[:200])
    elif damage == "text":
        bad.write_text("<html>")
    else:
        monkeypatch.setattr("deploykit.data._MAX_PIXELS", 800)
        picture(bad, 1, (40, 40))
    images = open_dataset(tmp_path, SMALL, labelled=False)
    with pytest.raises(UsageError, match=r"image .*1\.png") as caught:
        list(images.tensor_batches(2))
    assert "\n" not in str(caught.value)
    assert not [t for t in threading.enumerate() if t.name.startswith("deploykit-images")]


def test_synthetic_images_have_the_spectrum_and_levels_of_photographs() -> None:
    preprocessing = Preprocessing(size=64, mean=MEAN, std=STD)
    before = torch.random.get_rng_state()
    images = synthetic_images(16, preprocessing, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert images.shape == (16, 3, 64, 64) and images.dtype == torch.float32
    assert torch.equal(images, synthetic_images(16, preprocessing, seed=4))
    assert not torch.equal(images, synthetic_images(16, preprocessing, seed=5))
    values = images * torch.tensor(STD)[:, None, None]
    values += torch.tensor(MEAN)[:, None, None]
    assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6
    assert 0.1 < float(values.std()) < 0.4
    power = torch.fft.rfft2(values).abs().pow(2).mean(dim=(0, 1))
    low, high = power[0, 2:6].mean(), power[0, 20:28].mean()
    assert 10 < float(low / high) < 400  # 1/f² in power: (24/4)² = 36, clipping flattens it
    flat = values.permute(1, 0, 2, 3).reshape(3, -1)
    assert torch.corrcoef(flat)[0, 2] > 0.5
