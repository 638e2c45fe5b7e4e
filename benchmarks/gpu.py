"""What 8 bits and 2:4 zeros gain on a GPU: dense and sparse files of three models, side by side.

    python benchmarks/gpu.py                       # needs an NVIDIA GPU and TensorRT
    python benchmarks/gpu.py --models sht_vit_s1 --batches 1 --targets cpu-onnxruntime

For each model and batch two runs of ``deploykit.compress``: to 8 bits, and to 2:4 zeros and 8
bits. Their files (the float one, fp16 in TensorRT; the 2:4 one; the 8-bit one; the one that is
both) are timed in turns within a run, and the table gives each one's share of that run's float
time, with the kernels that the loaded file really has. Weights are untrained: times and kernels
are what is shown, not accuracy. Writes ``benchmarks/results/gpu.json`` and ``.md`` after each run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import deploykit
from deploykit.errors import DeploykitError
from deploykit.report.model import Report

RESULTS = Path(__file__).resolve().parent / "results" / "gpu"
MODELS = ["deit_s", "deit_b", "sht_vit_s4"]
KEPT = {
    "precision", "target", "kernels",
    "p50_ms", "ratio", "ratio_low", "ratio_high", "samples", "noisy",
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {"w8a8": {}, "2:4 + w8a8": {"sparsity": "2:4"}}


def files(report: Report) -> list[dict[str, Any]]:
    """Every measured file of a run."""
    return [
        {"file": measured.artifact, "runtime": measured.device.runtime}
        | measured.model_dump(include=KEPT)
        for measured in report.measurements
    ]


def markdown(results: dict[str, Any]) -> str:
    """The results as a table, with the command that made them."""
    first = next(iter(results.values()))["environment"]
    lines = [
        f"Made by `python benchmarks/gpu.py`; {first['cpu']}, GPU {first.get('gpu') or 'none'}; "
        "the files of a run timed in turns. Untrained weights: no accuracy.",
        "",
        "| model | batch | run | target | file | p50 | time / float (95 %) | kernels |",
        "|:--|--:|:--|:--|:--|--:|--:|:--|",
    ]
    for row in results.values():
        for r in row["files"]:
            ratio = "1" if r["ratio"] is None else f"{r['ratio']:.2f}"
            if r["ratio_low"] is not None:
                ratio += f" ({r['ratio_low']:.2f} … {r['ratio_high']:.2f})"
            kernels = ", ".join(f"{count} {name}" for name, count in r["kernels"].items())
            lines.append(
                f"| {row['model']} | {row['batch']} | {row['run']} | {r['target']} | {r['file']} "
                f"{r['precision']} | {r['p50_ms']:.3f} ms | {ratio}{' noisy' * r['noisy']} "
                f"| {kernels} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 256])
    parser.add_argument("--targets", nargs="+", default=["cuda-tensorrt", "cuda-torch"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for model in args.models:
        for batch in args.batches:
            for run, asked in RUNS.items():
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        report = deploykit.compress(
                            model=model, bits="w8a8", weights="random", targets=args.targets,
                            batch_size=batch, calib_images=32, out=Path(folder) / "out",
                            quiet=False, **asked,
                        )  # fmt: skip
                    except DeploykitError as error:
                        parser.exit(int(error.exit_code), f"{model}, batch {batch}: {error}\n")
                results[f"{model}, {batch}, {run}"] = {
                    "model": model, "batch": batch, "run": run,
                    "environment": report.environment, "files": files(report),
                }  # fmt: skip
                text = json.dumps(results, indent=1) + "\n"
                args.results.with_suffix(".json").write_text(text, encoding="utf-8")
                args.results.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    print(markdown(results))


if __name__ == "__main__":
    main()
