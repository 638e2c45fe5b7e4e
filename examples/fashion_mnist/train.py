"""Train the embedded demo model: SHViT-S1 on Fashion-MNIST at 112 px, on a CPU or a GPU.

    python examples/fashion_mnist/train.py --out build/train

The data are the four ``*-ubyte.gz`` files of Fashion-MNIST (MIT licence; Debian packages
them as ``dataset-fashion-mnist``). The run writes after every epoch ``state.pt`` (to resume from)
and ``train_log.jsonl``, and at the end ``shvit_s1_fashion_mnist_112.safetensors`` (the averaged
weights in fp16), ``calib.npz`` (512 training images) and ``test.npz`` (the first 2,000 test
images). Rerun the same command to go on after an interruption.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from deploykit._compat import timm

MODEL = "shvit_s1"
SIZE = 112
Tensors = tuple[Tensor, ...] | list[Tensor]
CHECKPOINT = "shvit_s1_fashion_mnist_112.safetensors"
MEAN, STD = 0.5, 0.5
CALIB_IMAGES, TEST_IMAGES = 512, 2000


def widths(share: float) -> dict[str, tuple[int, ...]]:
    """Arguments that make SHViT-S1 narrower: each width times ``share``, a multiple of eight."""
    return {
        name: tuple(max(8, round(share * width / 8) * 8) for width in full)
        for name, full in (("embed_dim", (128, 224, 320)), ("partial_dim", (32, 48, 68)))
    }


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file (uint8) of the MNIST family."""
    raw = gzip.decompress(path.read_bytes())
    ndim = raw[3]
    shape = np.frombuffer(raw, ">i4", count=ndim, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def load_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 28, 28) uint8 and labels (N,) int64 of ``train`` or ``t10k``."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz")
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def to_input(images: Tensor) -> Tensor:
    """uint8 (N, 28, 28) to normalised float (N, 3, 112, 112), as the deploykit demo does it."""
    x = images[:, None].float() / 255
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return ((x - MEAN) / STD).expand(-1, 3, -1, -1)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip half of the images and shift each by up to two pixels (edge padding of zeros)."""
    n = len(images)
    flip = torch.rand(n, generator=generator) < 0.5
    images = torch.where(flip[:, None, None], images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2))
    dy, dx = torch.randint(0, 5, (2, n, 1, 1), generator=generator)
    rows = torch.arange(28)[None, :, None] + dy
    cols = torch.arange(28)[None, None, :] + dx
    return padded[torch.arange(n)[:, None, None], rows, cols]


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    hits = 0
    for start in range(0, len(images), 500):
        logits = model(to_input(images[start : start + 500]).to(device))
        hits += int((logits.argmax(1).cpu() == labels[start : start + 500]).sum())
    return 100 * hits / len(images)


def moving_average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
    """One step of an exponential average, fast at first: a short run forgets its random start."""
    decay = min(0.998, (1 + int(count)) / (10 + int(count)))
    torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(averaged, current, count)


def train(args: argparse.Namespace) -> None:
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    images, labels = load_split(args.data, "train")
    test_images, test_labels = load_split(args.data, "t10k")

    shape = widths(args.width) if args.width != 1 else {}
    model = timm.create_model(MODEL, num_classes=10, **shape)
    model = model.to(device, memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=moving_average, use_buffers=True
    )
    steps_per_epoch = len(images) // args.batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * steps_per_epoch, pct_start=0.2
    )
    first = 0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]

    for epoch in range(first, args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        model.train()
        started, total_loss = time.time(), 0.0
        for step in range(steps_per_epoch):
            index = order[step * args.batch : (step + 1) * args.batch]
            x = to_input(augment(images[index], generator))
            x = x.to(device, memory_format=torch.channels_last)
            with torch.autocast(device, dtype=torch.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[index].to(device), label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            total_loss += loss.item()
            if step % 50 == 0:
                rate = (step + 1) * args.batch / (time.time() - started)
                print(
                    f"epoch {epoch} step {step}/{steps_per_epoch} {rate:.0f} images/s", flush=True
                )
        record = {
            "epoch": epoch + 1,
            "loss": round(total_loss / steps_per_epoch, 4),
            "top1_test_10000": round(top1(average.module, test_images, test_labels, device), 2),
            "seconds": round(time.time() - started, 1),
            "device": device,
            "torch": torch.__version__,
        }
        print(record, flush=True)
        with (out / "train_log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        state = {
            "model": model.state_dict(),
            "average": average.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, out / "state.tmp")
        (out / "state.tmp").replace(state_file)

    weights = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in average.module.cpu().state_dict().items()
    }
    save_file(weights, out / CHECKPOINT, metadata={"format": "pt", "data": "Fashion-MNIST"})
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    chosen = chosen[:CALIB_IMAGES]
    for name, (x, y) in {
        "calib.npz": (images[chosen], labels[chosen]),
        "test.npz": (test_images[:TEST_IMAGES], test_labels[:TEST_IMAGES]),
    }.items():
        np.savez_compressed(out / name, images=x.numpy(), labels=y.numpy())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("build/train"))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=float, default=1.0, help="share of SHViT-S1's widths")
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
