"""A sweep that is killed and goes on, beside one that is not: python benchmarks/sweep_kill.py OUT

Real trials (the whole pipeline) of a tiny network. 40 trials are drawn at random from four
recipes, so most are copies: what was run once isn't run again. Latency isn't compared: it is
measured anew in each sweep. Prints what held, and fails where something didn't.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tests.tiny_models:tiny_hybrid"


def write_inputs(folder: Path, trials: int) -> Path:
    """Images labelled with the float network's own answers, and the sweep's file."""
    sys.path.insert(0, str(ROOT))
    tiny_hybrid = importlib.import_module(MODEL.partition(":")[0]).tiny_hybrid

    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (256, 4, 4, 3), dtype=np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        labels = tiny_hybrid()((pixels - 0.5) / 0.25).argmax(1)
    np.savez(folder / "tiny.npz", images=images, labels=labels.numpy())
    spec = {
        "recipe": {
            "model": {"name": MODEL},
            "quantize": {"preset": "fast", "rounding": "nearest"},
            "calibration": {"data": "tiny.npz", "images": 32},
            "evaluation": {"data": "tiny.npz"},
            "verify": {"images": 8},
            "measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3,
                        "warmup_seconds": 0.0},
        },
        "search": {
            "quantize.bits": ["w8a8", "w4a8"],
            "quantize.keep_8bit": [["first", "last", "depthwise"], []],
        },
        "sampler": "random",
        "trials": trials,
        "objectives": ["top1", "bytes"],
        "seed": 1,
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(spec, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def finished(out: Path) -> int:
    """Trials in the sweep's database."""
    if not (out / "sweep.db").exists():
        return 0
    try:
        with sqlite3.connect(f"file:{out / 'sweep.db'}?mode=ro", uri=True) as database:
            return int(database.execute("select count(*) from trials").fetchone()[0])
    except sqlite3.OperationalError:  # not made yet, or being written
        return 0


def stamps(out: Path) -> dict[str, int]:
    """When the report of each finished trial was written."""
    reports = out.glob("trials/*/report.json")
    done = [p for p in reports if not (p.parent / ".work").exists()]
    return {p.parent.name: p.stat().st_mtime_ns for p in done}


def sweep(spec: Path, out: Path, options: list[str], kills: list[int]) -> dict[str, Any]:
    """Run the sweep, killed (SIGKILL) once so many trials are recorded; then to its end."""
    command = [sys.executable, "-m", "deploykit.cli", "sweep", str(spec), "-o", str(out)]
    command += ["--resume", *options]
    kept: dict[str, int] = {}
    for wanted in [*kills, None]:
        clock = time.monotonic()
        child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                                 stdout=subprocess.DEVNULL)  # fmt: skip
        while child.poll() is None:
            if wanted is not None and finished(out) >= wanted:
                child.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        code = child.wait()
        if code != (0 if wanted is None else -signal.SIGKILL):
            sys.exit(f"exit code {code} after {wanted} trials")
        now = stamps(out)
        assert kept.items() <= now.items(), "a finished trial ran again"
        kept = now
        done = finished(out)
        print(f"{out.name}: {done} recorded, {len(kept)} run, {time.monotonic() - clock:.0f} s")
    report: dict[str, Any] = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    return report


def figures(report: dict[str, Any]) -> list[Any]:
    """What must not depend on when a sweep was killed."""
    names = ("number", "values", "state", "top1", "drop", "bytes", "same_as", "folder")
    return [[trial[name] for name in names] for trial in report["trials"]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--kills", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ray", action="store_true", help="the killed one on a Ray cluster")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    spec = write_inputs(args.out, args.trials)
    options = ["--workers", str(args.workers)]
    ray = ["--engine", "ray"] if args.ray else []
    killed = sweep(spec, args.out / "killed", [*options, *ray], args.kills)
    whole = sweep(spec, args.out / "whole", options, [])
    assert figures(killed) == figures(whole), "the trials differ"
    assert killed["front"] == whole["front"], "the fronts differ"
    print(f"{len(whole['trials'])} trials equal to the digit; front: ")
    for number in whole["front"]:
        trial = whole["trials"][number]
        print(f"  trial {number}: {trial['values']}: top-1 {trial['top1']}, {trial['bytes']} bytes")


if __name__ == "__main__":
    main()
