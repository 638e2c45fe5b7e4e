"""How quantising grows with the model and with the number of calibration images.

    python benchmarks/growth.py

DeiT-Tiny, -Small and -Base shapes at 224 px with random weights: time and memory, no accuracy.
Every run is a fresh process, whose own peak of resident memory is taken. Writes
``benchmarks/results/growth.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
CASES = [(model, images, "fast") for model in MODELS for images in (32, 128)] + [
    (model, 128, "balanced") for model in MODELS[:2]
]


def measure(model: str, images: int, preset: str) -> dict[str, Any]:
    """Quantise random images with a preset at W4A4, in this process."""
    import resource
    import time

    import torch

    from deploykit.backbones.build import build_backbone
    from deploykit.graph.capture import capture
    from deploykit.quant.quantize import quantize
    from deploykit.quantize_options import quantize_options
    from deploykit.recipe import ModelSection, QuantizeSection

    backbone, _ = build_backbone(ModelSection(name=model, weights="random"), 0)
    captured = capture(backbone)
    options = quantize_options(QuantizeSection.model_validate({"bits": 4, "preset": preset}))

    def batches() -> Any:
        generator = torch.Generator().manual_seed(0)
        for _ in range(images // 16):
            yield torch.randn(16, 3, 224, 224, generator=generator)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    quantize(captured, options, batches)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "model": model,
        "parameters": sum(p.numel() for p in backbone.module.parameters()),
        "images": images,
        "preset": preset,
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak * 1024,
        "rss_before_bytes": before * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        model, images, preset = args.child
        print(json.dumps(measure(model, int(images), preset)))
        return
    rows = []
    for model, images, preset in CASES:
        command = [sys.executable, __file__, "--child", model, str(images), preset]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    from deploykit.environment import environment

    data = {"environment": environment(), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "growth.md").write_text(markdown(data), encoding="utf-8")


def markdown(data: dict[str, Any]) -> str:
    """Time and memory as a table."""
    where = data["environment"]
    lines = [
        f"Made by `python benchmarks/growth.py`; {where['cpu']}, {where['cores_allowed']} cores. "
        "W4A4 at 224 px, random weights: what quantising costs, not what it gives.",
        "",
        "| model | parameters | preset | images | seconds | peak memory | of it before |",
        "|:--|--:|:--|--:|--:|--:|--:|",
    ]
    for r in data["rows"]:
        lines.append(
            f"| {r['model']} | {r['parameters'] / 1e6:.1f} M | {r['preset']} | {r['images']} "
            f"| {r['seconds']:.0f} | {r['peak_rss_bytes'] / 1e9:.2f} GB "
            f"| {r['rss_before_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
