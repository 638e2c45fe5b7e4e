"""Every family pruned, made sparse and merged: saved, loaded in a fresh process, exported, equal.

    python benchmarks/prune_families.py
    python benchmarks/prune_families.py --models sht_vit_s4 --steps prune

Untrained weights made lively: what is shown is whether the changed network is one that can be
saved, loaded without its source, exported and run by ONNX Runtime with the same answers, at two
batch sizes; not accuracy. A cell that can't be says why. Writes
``benchmarks/results/prune_families.json`` and ``.md`` after each model; rows of others stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploykit.backbones.build import build_backbone
from deploykit.environment import environment
from deploykit.errors import DeploykitError, one_line
from deploykit.export.parity import compare, in_batches, make_reference
from deploykit.export.registry import Source, get_exporter
from deploykit.export.structure import load_model, save_model
from deploykit.export.target_reader import read_by
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.edit import makes_choices
from deploykit.graph.macs import count_macs
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_tokens import merge_tokens
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.prune.structured import StructureOptions, prune_structure
from deploykit.recipe import ModelSection
from deploykit.synthetic import synthetic_images
from deploykit.types import Artifact, Backbone, PassRecord

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = (
    "sht_vit_s4",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_dinov2",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "convnext_tiny",
    "efficientformer_l1",
    "nextvit_small",
    "mobilevit_s",
    "mobilevitv2_050",
    "pvt_v2_b0",
    "maxvit_tiny_tf_224",
    "efficientnet_b0",
    "resnet18",
)
SIZES = {"vit_small_patch14_dinov2": 224}
IMAGES = 8
Made = tuple[CapturedModel, PassRecord]


@dataclass(frozen=True)
class Prepared:
    """A backbone, its graph, and some images."""

    backbone: Backbone
    captured: CapturedModel
    pixels: Tensor


def pruned(model: Prepared) -> Made:
    """Thirty percent of the multiply-adds less."""
    options = StructureOptions(ratio=0.3, importance="magnitude")
    changed, record = prune_structure(model.backbone, options, lambda: [model.pixels])
    return capture(changed), record


def sparse(model: Prepared) -> Made:
    """2:4 by magnitude."""
    return sparsify(model.captured, SparsityOptions("2:4", "magnitude"))


def merged(model: Prepared) -> Made:
    """A third of the tokens in three blocks."""
    return merge_tokens(model.captured, MergeOptions(schedule="fast"))


def merged_locally(model: Prepared) -> Made:
    """A third of the tokens, around the MLPs of three blocks."""
    return merge_tokens(model.captured, MergeOptions(schedule="fast", place="local"))


STEPS: dict[str, Callable[[Prepared], Made]] = {
    "prune": pruned,
    "2:4": sparse,
    "merge": merged,
    "merge locally": merged_locally,
}


def check(folder: Path, images: Path) -> dict[str, Any]:
    """In a fresh process: load, export, and compare the file with the loaded graph."""
    saved = load_model(folder)
    pixels = torch.load(images, weights_only=True)["pixels"]
    path = folder / "model.onnx"
    source = Source(
        saved.graph_module, saved.backbone, "fp32", dynamic_batch=saved.dynamic_batch, metadata={}
    )
    made = get_exporter("onnx").export(source, path)
    size = IMAGES if saved.dynamic_batch else 1
    # Graphs that make choices are judged as quantised ones are; see deploykit.export.parity.
    original = torch.load(images, weights_only=True)["logits"]
    before = original if makes_choices(saved.graph_module) else None
    graph = saved.graph_module
    reference = make_reference(
        "graph", lambda x: in_batches(graph, x, size), pixels, before, 0, graph
    )
    runtime, run = read_by("cpu-onnxruntime", path)
    artifact = Artifact(
        name="compressed", format="onnx", path=path, bytes=path.stat().st_size, sha256="",
        precision="fp32", weights="untrained", dynamic_batch=made.dynamic_batch,
    )  # fmt: skip
    batches = (1, IMAGES) if made.dynamic_batch else (1,)
    rows = [
        compare(artifact, runtime, batch, in_batches(run, pixels, batch), reference, "synthetic")
        for batch in batches
    ]
    return {
        "onnx_bytes": path.stat().st_size,
        "sqnr_db": min(row.sqnr_db for row in rows),
        "batches": list(batches),
        "passed": all(row.passed for row in rows),
        "same_logits": bool(torch.equal(in_batches(graph, pixels, size), _wanted(images))),
    }


def _wanted(images: Path) -> Tensor:
    found: Tensor = torch.load(images, weights_only=True)["changed"]
    return found


def cells(model: str, steps: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every step of a model."""
    section = ModelSection(name=model, weights="random", img_size=SIZES.get(model))
    backbone, _ = build_backbone(section, 0)
    captured = capture(backbone)
    pixels = synthetic_images(IMAGES, backbone.preprocessing, 0)
    size = IMAGES if captured.dynamic_batch else 1
    logits = in_batches(captured.graph_module, pixels, size)
    side = backbone.preprocessing.size
    prepared = Prepared(backbone, captured, pixels)
    before = count_macs(captured.graph_module, side)
    for step in steps:
        began = time.perf_counter()
        cell: dict[str, Any] = {"macs_before": before}
        try:
            changed, record = STEPS[step](prepared)
            cell["summary"] = record.summary
            cell["macs"] = count_macs(changed.graph_module, side)
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                save_model(
                    changed.graph_module, backbone, folder,
                    precision="fp32", dynamic_batch=changed.dynamic_batch,
                )  # fmt: skip
                cell["bytes"] = (folder / "model.safetensors").stat().st_size
                images = folder / "images.pt"
                own = in_batches(changed.graph_module, pixels, size)
                torch.save({"pixels": pixels, "logits": logits, "changed": own}, images)
                command = [sys.executable, str(Path(__file__).resolve()), "--check", name]
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                if ran.returncode:
                    raise DeploykitError(ran.stderr.strip().splitlines()[-1])
                cell |= json.loads(ran.stdout.splitlines()[-1])
        except DeploykitError as error:
            cell["refused"] = one_line(error)
        cell["seconds"] = round(time.perf_counter() - began, 1)
        yield step, cell


def markdown(results: dict[str, Any]) -> str:
    """The grid, and the reasons for every no."""
    steps = list(STEPS)
    lines = [
        "Made by `python benchmarks/prune_families.py`; untrained weights. A cell: multiply-adds "
        "left, and the SQNR of the ONNX file against the graph that was loaded in a fresh process "
        "(the worse of two batch sizes; ✘ a miss). Networks that merge tokens make choices, which "
        "a last digit can turn: see the parity rules in `export/parity.py`.",
        "",
        f"| model | {' | '.join(steps)} |",
        "|:--|" + ":--|" * len(steps),
    ]
    reasons: list[str] = []
    for model, row in results["models"].items():
        texts = []
        for step in steps:
            cell = row.get(step)
            if cell is None:
                texts.append("–")
            elif "refused" in cell:
                reasons.append(f"{model}, {step}: {cell['refused']}")
                texts.append(f"no ({len(reasons)})")
            else:
                good = cell["passed"] and cell["same_logits"]
                left = 100 * cell["macs"] / cell["macs_before"]
                texts.append(f"{left:.0f} %, {cell['sqnr_db']:.0f} dB{'' if good else ' ✘'}")
        lines.append(f"| {model} | {' | '.join(texts)} |")
    lines += ["", *(f"{n}. {text}" for n, text in enumerate(reasons, start=1))]
    return "\n".join(lines) + "\n"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--steps", nargs="*", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        print(json.dumps(check(args.check, args.check / "images.pt")))
        return
    stem = RESULTS / "prune_families"
    results: dict[str, Any] = {"models": {}}
    if stem.with_suffix(".json").exists():
        results = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    for model in args.models:
        row = results["models"].setdefault(model, {})
        for step, cell in cells(model, args.steps):
            row[step] = cell
            print(model, step, json.dumps(cell), flush=True)
        results["environment"] = environment()
        known = {name: results["models"][name] for name in MODELS if name in results["models"]}
        results["models"] = known | results["models"]
        text = json.dumps(results, indent=2) + "\n"
        stem.with_suffix(".json").write_text(text, encoding="utf-8")
        stem.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


if __name__ == "__main__":
    main()
