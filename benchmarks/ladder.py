"""What each ingredient adds on the real ViT at 4 bits: a ladder, rung by rung.

    python benchmarks/ladder.py --data FOLDER

Every rung is a file, run by ONNX Runtime on the same validation images, paired with the float
file's answers. Writes ``benchmarks/results/ladder.json``, ``.md`` and ``.svg``. FOLDER is that of
``benchmarks/accuracy.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch

from deploykit.environment import environment
from deploykit.export.onnx import onnx_bytes
from deploykit.graph.capture import capture
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.targets.registry import get_target

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
RUNGS: list[tuple[str, dict[str, Any]]] = [
    ("min-max ranges, nearest rounding", {}),
    (
        "percentile ranges and weight scales",
        {"activation_range": "percentile", "weight_range": "mse"},
    ),
    ("norm fold (RepQ)", {"norm_fold": "repq"}),
    ("log grids for softmax", {"softmax": "auto"}),
    ("bias correction", {"bias_correction": True}),
    ("GPTQ", {"rounding": "gptq"}),
    ("ridge correction (ERQ)", {"rounding": "erq"}),
    ("queries, keys and values folded", {"head_fold": True}),
    ("norm fold by measured error", {"norm_fold": "auto"}),
    (
        "block reconstruction, 300 steps",
        {"reconstruction": "plain", "reconstruction_iterations": 300},
    ),
]
BOTTOM = QuantizeOptions(
    4, 4, activation_range="minmax", weight_range="minmax", norm_fold="off", head_fold=False,
    softmax="uniform", bias_correction=False, equalize=False,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--calib-images", type=int, default=128)
    parser.add_argument("--images", type=int, help="validation images; all by default")
    parser.add_argument("--rungs", type=int, nargs="*", help="numbers from 0; all by default")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from benchmarks import peer_common as common

    backbone = common.load_backbone(args.data)
    captured = capture(backbone)
    calibration, described = common.calibration_tensor(args.data, backbone, args.calib_images)
    images = common.validation_set(args.data, backbone, args.images)
    probe = next(images.tensor_batches(100))[0]

    def run_file(data: bytes) -> tuple[list[int], torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(data)
            session = get_target("cpu-onnxruntime").load(path, torch.get_num_threads())

            def call(x: torch.Tensor) -> torch.Tensor:
                return torch.from_numpy(session(x.numpy()))

            return common.predictions(call, images), call(probe)

    reference, exact = run_file(onnx_bytes(captured.graph_module, backbone))
    rows, options = [], BOTTOM
    for number, (name, change) in enumerate(RUNGS):
        options = replace(options, **change)
        if args.rungs and number not in args.rungs:
            continue
        started = time.perf_counter()
        made = quantize(captured, options, lambda: calibration.split(16))
        seconds = time.perf_counter() - started
        found, logits = run_file(onnx_bytes(made.graph_module, backbone))
        row = common.accuracy_row(images, reference, found)
        row |= {"rung": name, "seconds": round(seconds, 1), "sqnr_db": sqnr_db(exact, logits)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    options_given = [f"--calib-images {args.calib_images}"]
    options_given += [f"--images {args.images}"] if args.images else []
    options_given += ["--rungs " + " ".join(map(str, args.rungs))] if args.rungs else []
    command = " ".join(["python benchmarks/ladder.py", *options_given])
    data = {
        "command": command,
        "environment": environment(),
        "calibration": described,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "ladder.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "ladder.md").write_text(markdown(data), encoding="utf-8")
    draw(rows, RESULTS / "ladder.svg")


def markdown(data: dict[str, Any]) -> str:
    """The ladder as a table."""
    rows, where = data["rows"], data["environment"]
    lines = [
        f"Made by `{data['command']}`; {where['cpu']}, {where['cores_allowed']} cores. "
        "Each rung adds its ingredient, and those of rungs left out, to the ones above; accuracy "
        "is that of the ONNX file.",
        "",
        "| W4A4, the real ViT | top-1 | lost, points (95 %) | logits' SQNR | seconds to make |",
        "|:--|--:|--:|--:|--:|",
    ]
    for r in rows:
        lost = f"{r['drop']:.1f} ({r['drop_low']:.1f} … {r['drop_high']:.1f})"
        lines.append(
            f"| {r['rung']} | {r['top1']:.1f} % | {lost} | {r['sqnr_db']:.1f} dB "
            f"| {r['seconds']:.0f} |"
        )
    first = rows[0]
    lines += ["", f"fp32: {first['top1_original']:.1f} % of {first['images']} images. "
              f"Calibrated on {data['calibration']}."]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The ladder as bars, the float model's accuracy as a line."""
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(rows) + 1), layout="constrained")
    names = [row["rung"] for row in rows]
    bars = axes.barh(names, [row["top1"] for row in rows], color="#4477aa")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.axvline(rows[0]["top1_original"], color="#bb5566", linestyle="--", label="fp32")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("top-1 of the W4A4 file, %")
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
