"""Accuracy, size and latency of the file that ships, at several widths.

    python benchmarks/accuracy.py demo
    python benchmarks/accuracy.py vit --data FOLDER              # real images and weights
    python benchmarks/accuracy.py efficientnet --data FOLDER
    python benchmarks/accuracy.py shvit_s4                       # untrained: sizes, not accuracy

Writes ``benchmarks/results/SUITE.json`` and ``.md``, with the environment. FOLDER holds
``imagenette/{train,val}``, ``imagenet-val``, ``imagenet-sample`` and
``weights/dinov2_s_imagenette_168.safetensors``; none of it is part of deploykit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import deploykit
from deploykit.recipe_io import apply_overrides, load_recipe
from deploykit.report.model import Report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
# Width and preset of every row; at w8a8 NNCF's file is compared where there are real weights.
RUNS = {
    "demo": [(b, "fast") for b in ("w8a8", "w6a6", "w4a8", "w4a4", "w4a16")]
    + [("w4a4", "balanced")],
    "vit": [(b, "fast") for b in ("w8a8", "w6a6", "w4a8", "w4a4", "w3a3")]
    + [(b, "balanced") for b in ("w6a6", "w4a8", "w4a4", "w3a3")]
    + [("w4a4", "best")],
    "efficientnet": [("w8a8", "fast"), ("w4a8", "fast"), ("w4a8", "balanced")],
    "shvit_s4": [("w8a8", "fast"), ("w4a4", "fast")],
}
COMPARED = ("vit", "efficientnet")


def options(suite: str, data: Path | None) -> dict[str, Any]:
    """Arguments of ``deploykit.compress`` for a suite."""
    if suite == "demo":
        return {"recipe": ROOT / "examples" / "fashion_mnist" / "demo.yaml"}
    if suite == "shvit_s4":
        return {"model": "sht_vit_s4", "weights": "random"}
    if data is None:
        sys.exit(f"benchmarks/accuracy.py: {suite} needs --data FOLDER (see --help)")
    if suite == "vit":
        return {
            "model": "vit_small_patch14_dinov2",
            "img_size": 168,
            "weights": data / "weights" / "dinov2_s_imagenette_168.safetensors",
            "calib": data / "imagenette" / "train",
            "data": data / "imagenette" / "val",
            "calib_images": 128,
        }
    return {
        "model": "benchmarks.models:efficientnet_lite0",
        "calib": data / "imagenet-sample",
        "data": data / "imagenet-val",
        "calib_images": 128,
    }


def overridden(recipe: Path | None, overrides: list[str]) -> Any:
    """The recipe's data with ``--set`` laid over it."""
    if recipe is None:
        return apply_overrides({}, overrides)
    return load_recipe(recipe, overrides)


def row(report: Report, preset: str, name: str = "compressed") -> dict[str, Any]:
    """The figures of one file of a run."""
    accuracy = report.find_accuracy(name)
    target = report.measurements[0].target
    measured = report.find_measurement(name, target)
    artifact = next(a for a in report.artifacts if a.name == name)
    original = report.find_measurement("original", target)
    assert measured is not None and original is not None
    return {
        "bits": artifact.precision,
        "preset": preset if name == "compressed" else artifact.algorithm,
        "weights": report.weights.kind,
        "images": accuracy.images if accuracy else None,
        "top1_original": accuracy.top1_original if accuracy else None,
        "top1": accuracy.top1 if accuracy else None,
        "drop": accuracy.drop if accuracy else None,
        "drop_low": accuracy.drop_low if accuracy else None,
        "drop_high": accuracy.drop_high if accuracy else None,
        "bytes_original": report.original.bytes,
        "bytes": artifact.bytes,
        "ratio": measured.ratio,
        "ratio_low": measured.ratio_low,
        "ratio_high": measured.ratio_high,
        "noisy": measured.noisy,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "peak_rss_bytes_original": original.peak_rss_bytes,
        "parity_sqnr_db": min(p.sqnr_db for p in report.parity if p.artifact == name),
        "seconds": report.seconds,
        "kernels": measured.kernels,
    }


def markdown(suite: str, rows: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The results as a table, with the command that made them."""
    lines = [
        f"Made by `python benchmarks/accuracy.py {suite}`; "
        f"{environment['cpu']}, {environment['cores_allowed']} cores, "
        f"onnxruntime {environment['packages']['onnxruntime']}, one thread, batch 1.",
        "",
        "| bits | preset | top-1 | lost, points (95 %) | size | time / fp32 (95 %) |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for r in rows:
        top1, lost = "untrained", "–"
        if r["top1"] is not None:
            top1 = f"{r['top1']:.2f} %"
            lost = f"{r['drop']:.2f} ({r['drop_low']:.2f} … {r['drop_high']:.2f})"
        time = f"{r['ratio']:.2f} ({r['ratio_low']:.2f} … {r['ratio_high']:.2f})"
        time += " noisy" if r["noisy"] else ""
        size = f"{r['bytes'] / 1e6:.2f} MB"
        lines.append(f"| {r['bits']} | {r['preset']} | {top1} | {lost} | {size} | {time} |")
    first = rows[0]
    if first["top1_original"] is not None:
        lines.append("")
        lines.append(
            f"fp32: {first['top1_original']:.2f} % of {first['images']} images, "
            f"{first['bytes_original'] / 1e6:.1f} MB. Accuracy is that of the ONNX file, run by "
            "ONNX Runtime, paired image by image with the fp32 file's."
        )
    else:
        lines += ["", f"fp32: {first['bytes_original'] / 1e6:.1f} MB."]
    return "\n".join(lines) + "\n"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=sorted(RUNS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--bits", nargs="*", help="only these rows; the others stay")
    parser.add_argument("--preset", nargs="*", help="only these rows; the others stay")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / args.suite
    kept: dict[tuple[str, str], dict[str, Any]] = {}
    if args.bits or args.preset:
        kept = {
            (r["bits"], r["preset"]): r
            for r in json.loads(stem.with_suffix(".json").read_text())["rows"]
        }
    for bits, preset in RUNS[args.suite]:
        if (args.bits and bits not in args.bits) or (args.preset and preset not in args.preset):
            continue
        with tempfile.TemporaryDirectory() as folder:
            chosen = options(args.suite, args.data)
            chosen["recipe"] = overridden(chosen.pop("recipe", None), args.set)
            compare = ["nncf"] if bits == "w8a8" and args.suite in COMPARED else None
            report = deploykit.compress(
                **chosen, bits=bits, preset=preset, compare=compare,
                out=Path(folder) / "out", quiet=False,
            )  # fmt: skip
        for name in ("compressed", *(compare or [])):
            made = row(report, preset, name)
            kept[made["bits"], made["preset"]] = made
            print(json.dumps(made), flush=True)
        rows = sorted(kept.values(), key=lambda r: _place(args.suite, r))
        data = {"environment": report.environment, "rows": rows}
        stem.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        text = markdown(args.suite, rows, report.environment)
        stem.with_suffix(".md").write_text(text, encoding="utf-8")


def _place(suite: str, r: dict[str, Any]) -> tuple[int, int]:
    """Rows in the order of widths, then of presets; others' files after ours."""
    widths = list(dict.fromkeys(bits for bits, _ in RUNS[suite]))
    presets = ["fast", "balanced", "best"]
    found = presets.index(r["preset"]) if r["preset"] in presets else len(presets)
    return widths.index(r["bits"]), found


if __name__ == "__main__":
    main()
