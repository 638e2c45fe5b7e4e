"""Pruning the demo model, against simply training a narrower one: accuracy and time at one cost.

    python benchmarks/prune_width.py                 # with Debian's dataset-fashion-mnist
    python benchmarks/prune_width.py --data FOLDER --epochs 1 --ratio 0.5

The demo's SHViT-S1, which learnt Fashion-MNIST's 60,000 training images in six epochs, loses
``--ratio`` of its multiply-adds and learns from the original for ``--epochs`` more. An SHViT of
the same depth, with all its widths scaled so that it costs the same, is trained by
``examples/fashion_mnist/train.py`` for as many epochs as those two together. Both files and the
original are rated on the 10,000 test images and timed in turns. Writes
``benchmarks/results/prune_width.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import deploykit
from deploykit._compat import timm
from deploykit.graph.macs import count_macs
from deploykit.report.model import Report
from deploykit.targets.measure import measure

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "fashion_mnist"
RESULTS = HERE / "results" / "prune_width"
TARGET = "cpu-onnxruntime"
RECOVERY_RATE = 1e-3
# Epochs the demo's weights were trained for.
TRAINED = len((EXAMPLE / "train_log.jsonl").read_text(encoding="utf-8").splitlines())
FACTORY = """from deploykit._compat import timm


def build(num_classes=10):
    return timm.create_model(
        "{name}", num_classes=num_classes, embed_dim={embed_dim}, partial_dim={partial_dim}
    )
"""


def training_script() -> ModuleType:
    """``examples/fashion_mnist/train.py`` as a module."""
    spec = importlib.util.spec_from_file_location("fashion_mnist_train", EXAMPLE / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def width_of(script: ModuleType, macs: int) -> tuple[float, int]:
    """The width, in hundredths, whose model costs nearest to ``macs``, and what it costs."""
    costs = {}
    for width in (hundredths / 100 for hundredths in range(30, 100)):
        model = timm.create_model(script.MODEL, num_classes=10, **script.widths(width)).eval()
        costs[width] = count_macs(model, script.SIZE)
    nearest = min(costs, key=lambda width: abs(costs[width] - macs))
    return nearest, costs[nearest]


def compressed(model: dict[str, Any], data: Path, out: Path, **sections: Any) -> Report:
    """One run to W8A8: its files are the float model, each step's, and the integer one."""
    preprocessing = {"size": 112, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}
    return deploykit.compress(
        {"model": {"num_classes": 10, "preprocessing": preprocessing, **model}, **sections},
        bits="w8a8",
        calib=data / "train.npz",
        data=data / "test.npz",
        out=out,
        quiet=False,
    )


def row(report: Report, out: Path, file: str, macs: int) -> dict[str, Any]:
    """What is known of a run's file before it is timed."""
    artifact = next(a for a in report.artifacts if (a.name, a.format) == (file, "onnx"))
    rated = next((a for a in report.accuracy if (a.artifact, a.format) == (file, "onnx")), None)
    top1 = rated.top1 if rated is not None else report.accuracy[0].top1_original
    return {
        "path": str(out / artifact.path),
        "precision": artifact.precision,
        "top1": top1,
        "macs": macs,
        "bytes": artifact.bytes,
    }


def markdown(results: dict[str, Any]) -> str:
    """The results as a table, with the command that made them."""
    environment = results["environment"]
    lines = [
        f"Made by `python benchmarks/prune_width.py`; {environment['cpu']}, ONNX Runtime, one "
        f"thread, batch 1, all files timed in turns. The original saw Fashion-MNIST's training "
        f"images {TRAINED} times, the pruned one {results['epochs']} time(s) more, the narrow one "
        f"{TRAINED + results['epochs']} times; top-1 on the {results['images']:,} test images.",
        "",
        "| model | precision | multiply-adds | size | top-1 | time / original (95 %) |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for name, r in results["files"].items():
        time_text = (
            "1"
            if r["ratio"] is None
            else (f"{r['ratio']:.2f} ({r['ratio_low']:.2f} … {r['ratio_high']:.2f})")
        )
        lines.append(
            f"| {name} | {r['precision']} | {r['macs'] / 1e6:.1f} M | {r['bytes'] / 1e6:.1f} MB "
            f"| {r['top1']:.2f} % | {time_text}{' noisy' if r['noisy'] else ''} |"
        )
    pruned, narrow = results["pruning_seconds"], results["training_seconds"]
    lines += ["", f"Pruning, recovery and their checks took {pruned:.0f} s, training {narrow:.0f}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=0.5)
    args = parser.parse_args()
    script = training_script()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split, file in (("train", "train.npz"), ("t10k", "test.npz")):
            images, labels = script.load_split(args.data, split)
            np.savez(folder / file, images=images.numpy(), labels=labels.numpy())

        started = time.monotonic()
        pruned = compressed(
            {"name": "shvit_s1", "weights": str(EXAMPLE / script.CHECKPOINT)},
            folder,
            folder / "pruned",
            prune={"ratio": args.ratio},
            recover={
                "data": str(folder / "train.npz"), "epochs": args.epochs, "minutes": 600,
                "batch_size": 128, "learning_rate": RECOVERY_RATE,
            },
        )  # fmt: skip
        pruning_seconds = time.monotonic() - started
        record = next(r for r in pruned.passes if r.name == "prune_structure")
        full, macs = record.details["macs"]

        width, narrow_macs = width_of(script, macs)
        started = time.monotonic()
        command = [
            sys.executable, str(EXAMPLE / "train.py"), "--data", str(args.data), "--out",
            str(folder / "trained"), "--epochs", str(TRAINED + args.epochs), "--width", str(width),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        training_seconds = time.monotonic() - started
        (folder / "narrow.py").write_text(FACTORY.format(name=script.MODEL, **script.widths(width)))
        sys.path.insert(0, str(folder))
        weights = str(folder / "trained" / script.CHECKPOINT)
        narrow = compressed({"name": "narrow:build", "weights": weights}, folder, folder / "narrow")

        files = {
            "original": row(pruned, folder / "pruned", "original", full),
            "pruned and recovered": row(pruned, folder / "pruned", "recovered", macs),
            "narrow from the start": row(narrow, folder / "narrow", "original", narrow_macs),
            "pruned and recovered, int8": row(pruned, folder / "pruned", "compressed", macs),
            "narrow from the start, int8": row(
                narrow, folder / "narrow", "compressed", narrow_macs
            ),
        }
        timed = measure(
            TARGET,
            [(name, r["path"], r["precision"]) for name, r in files.items()],
            input_shape=(3, 112, 112),
            max_seconds=60.0,
        )
        for measured in timed:
            found = files[measured.artifact]
            del found["path"]
            found |= {
                key: getattr(measured, key)
                for key in ("p50_ms", "ratio", "ratio_low", "ratio_high", "samples", "noisy")
            }
        results = {
            "environment": pruned.environment,
            "epochs": args.epochs,
            "images": pruned.accuracy[0].images,
            "width": width,
            "pruning_seconds": pruning_seconds,
            "training_seconds": training_seconds,
            "files": files,
        }
    RESULTS.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    RESULTS.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
