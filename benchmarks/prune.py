"""Fewer tokens, widths and weights: accuracy, size and latency of the files that ship.

    python benchmarks/prune.py vit --data FOLDER       # real images and weights; about an hour
    python benchmarks/prune.py vit --data FOLDER --rows "tokens + w8a8"

Every row is one run of ``deploykit.compress``: all its files (the original, each step, the
compressed one, and NNCF's int8 of the original) are timed in turns, on every target. Writes
``benchmarks/results/prune_SUITE.json`` and ``.md`` after each row. FOLDER is that of
``benchmarks/accuracy.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import deploykit
from deploykit.recipe_io import apply_overrides
from deploykit.report.model import Report
from deploykit.targets.device import allowed_cores

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = ["cpu-openvino", "cpu-onnxruntime"]
KEPT = {"precision", "target", "p50_ms", "ratio", "ratio_low", "ratio_high", "samples", "noisy"}
STEPS = ("prune_structure", "merge_tokens", "sparsify", "recover", "soup")
PROCESSOR_MINUTES = 20  # of recovery, over all the cores there are
# What each row asks for beyond the suite's own options; w8a8 where no algorithm is named.
ROWS: dict[str, dict[str, Any]] = {
    "w8a8": {},
    "tokens + w8a8": {"tokens": "auto"},
    "a quarter of the tokens, three times + w8a8": {
        "tokens": "fast",
        "recipe": {"merge": {"share": 0.25}},
    },
    "22 % of the tokens, three times, recovered + w8a8": {
        "tokens": "fast",
        "recover": True,
        "recipe": {"merge": {"share": 0.22}},
    },
    "pruned 30 %, recovered + w8a8": {"prune": 0.3, "recover": True},
    "pruned 30 %, 15 % of the tokens, three times, recovered + w8a8": {
        "prune": 0.3,
        "tokens": "fast",
        "recover": True,
        "recipe": {"merge": {"share": 0.15}},
    },
    "2:4 + w8a8": {"sparsity": "2:4"},
}


def options(data: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``deploykit.compress`` for a row."""
    asked = dict(asked)
    if asked.pop("recover", False):
        cores = len(allowed_cores())
        asked |= {
            "recover": data / "imagenette" / "train",
            "recover_minutes": PROCESSOR_MINUTES / cores,
        }
    return {
        "model": "vit_small_patch14_dinov2",
        "img_size": 168,
        "weights": data / "weights" / "dinov2_s_imagenette_168.safetensors",
        "calib": data / "imagenette" / "train",
        "calib_images": 128,
        "data": data / "imagenette" / "val",
        "targets": TARGETS,
        "compare": ["nncf"],
        "bits": "w8a8",
        **asked,
    }


def files(report: Report) -> list[dict[str, Any]]:
    """Every file of a run on every target."""
    found = []
    for target in TARGETS:
        nncf = report.find_measurement("nncf", target)
        for measured in (m for m in report.measurements if m.target == target):
            artifact = next(
                a for a in report.artifacts
                if (a.name, a.format) == (measured.artifact, measured.format)
            )  # fmt: skip
            accuracy = next(
                (a for a in report.accuracy
                 if (a.artifact, a.format) == (measured.artifact, measured.format)),
                None,
            )  # fmt: skip
            beside = None
            if nncf is not None and nncf.ratio and measured.ratio:
                beside = nncf.ratio / measured.ratio
            elif nncf is not None and nncf.ratio and measured.artifact == "original":
                beside = nncf.ratio
            found.append({
                "file": measured.artifact,
                "runtime": measured.device.runtime,
                "bytes": artifact.bytes,
                "top1": accuracy.top1 if accuracy else None,
                "drop": accuracy.drop if accuracy else None,
                "drop_low": accuracy.drop_low if accuracy else None,
                "drop_high": accuracy.drop_high if accuracy else None,
                "images": accuracy.images if accuracy else None,
                **measured.model_dump(include=KEPT),
                "times_faster_than_nncf": beside,
            })  # fmt: skip
    return found


def markdown(rows: dict[str, Any]) -> str:
    """The results as a table, with the command that made them."""
    first = next(iter(rows.values()))
    environment = first["environment"]
    lines = [
        f"Made by `python benchmarks/prune.py vit`; {environment['cpu']}, "
        f"{environment['cores_allowed']} cores, one thread, batch 1; the files of a run are timed "
        "in turns. Top-1 is the file's, paired with the float file's image by image.",
        "",
        "| run | target | file | top-1 | lost, points (95 %) | size | time / fp32 (95 %) "
        "| times as fast as NNCF's int8 |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        for r in row["files"]:
            if r["file"] == "original":
                continue
            top1 = lost = "–"
            if r["top1"] is not None:
                top1 = f"{r['top1']:.2f} %"
                lost = f"{r['drop']:.2f} ({r['drop_low']:.2f} … {r['drop_high']:.2f})"
            time = f"{r['ratio']:.2f} ({r['ratio_low']:.2f} … {r['ratio_high']:.2f})"
            time += " noisy" if r["noisy"] else ""
            beside = r["times_faster_than_nncf"]
            lines.append(
                f"| {name} | {r['target']} | {r['file']} {r['precision']} | {top1} | {lost} "
                f"| {r['bytes'] / 1e6:.1f} MB | {time} | {f'{beside:.2f}' if beside else '–'} |"
            )
    lines.append("")
    for name, row in rows.items():
        steps = [text for text in row["steps"] if text.partition(":")[0] in STEPS]
        lines += [f"- {name}: {text}" for text in steps]
    return "\n".join(lines) + "\n"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", choices=["vit"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), help="only these; others stay")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    stem = RESULTS / f"prune_{args.suite}"
    results: dict[str, Any] = {}
    if args.rows and stem.with_suffix(".json").exists():
        results = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    for name in args.rows or ROWS:
        with tempfile.TemporaryDirectory() as folder:
            chosen = options(args.data, ROWS[name])
            report = deploykit.compress(
                recipe=apply_overrides(chosen.pop("recipe", {}), args.set),
                **chosen,
                out=Path(folder) / "out",
                quiet=False,
            )
        results[name] = {
            "environment": report.environment,
            "seconds": report.seconds,
            "steps": [
                f"{record.name}: {record.summary}"
                for record in report.passes
                if record.name not in ("preset",)
            ],
            "files": files(report),
        }
        results = {key: results[key] for key in ROWS if key in results}
        text = json.dumps(results, indent=2) + "\n"
        stem.with_suffix(".json").write_text(text, encoding="utf-8")
        stem.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
        print(name, json.dumps(results[name]["files"]), flush=True)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
