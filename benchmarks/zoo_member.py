"""One backbone through everything, in this process: a line of JSON for each step.

    python -m benchmarks.zoo_member shvit_s1 8.0

``benchmarks/zoo.py`` runs it. The second argument bounds the process's memory in GiB.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.backbones.build import build_backbone
from deploykit.errors import DeploykitError, one_line
from deploykit.export.parity import compare, in_batches, make_reference
from deploykit.export.registry import Source, get_exporter
from deploykit.export.target_reader import read_by
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.edit import makes_choices
from deploykit.graph.macs import count_macs
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_tokens import merge_tokens
from deploykit.prune.structured import StructureOptions, prune_structure
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quantizing import SYMMETRY
from deploykit.recipe import ModelSection
from deploykit.synthetic import synthetic_images
from deploykit.targets.measure import measure
from deploykit.types import Artifact, Backbone

__all__ = ["BATCHES", "STEPS", "cells"]

BATCHES = (1, 4)
TARGET = "cpu-onnxruntime"
Cell = dict[str, Any]


@dataclass
class Member:
    """A backbone and what its steps share: its graph, images, logits, and the files it became."""

    backbone: Backbone
    folder: Path
    captured: CapturedModel | None = None
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def graph(self) -> CapturedModel:
        if self.captured is None:
            raise DeploykitError("there is no captured graph")
        return self.captured

    @property
    def images(self) -> Tensor:
        return synthetic_images(max(BATCHES), self.backbone.preprocessing, 0)

    def logits(self, graph_module: fx.GraphModule, dynamic: bool) -> Tensor:
        return in_batches(graph_module, self.images, max(BATCHES) if dynamic else 1)


def captured(member: Member) -> Cell:
    """A graph that computes what the module computes."""
    member.captured = graph = capture(member.backbone)
    wanted = member.backbone.module(member.images)
    got = member.logits(graph.graph_module, graph.dynamic_batch)
    error = float((got - wanted).abs().max() / wanted.abs().max())
    if not error < 1e-4:
        raise DeploykitError(f"the captured graph differs from the module by {error:.1g}")
    macs = count_macs(graph.graph_module, member.backbone.preprocessing.size)
    return {"error": error, "macs": macs, "dynamic_batch": graph.dynamic_batch}


def original(member: Member) -> Cell:
    """The float graph as an ONNX file."""
    return shipped(member, "fp32", member.graph.graph_module, member.graph.dynamic_batch)


def quantised(bits: int) -> Callable[[Member], Cell]:
    """The graph quantised to ``bits``, as an ONNX file."""

    def step(member: Member) -> Cell:
        options = QuantizeOptions(
            bits, bits, symmetry=SYMMETRY[get_exporter("onnx").profile], bias_correction=False
        )
        size = max(BATCHES) if member.graph.dynamic_batch else 1
        model = quantize(member.graph, options, lambda: member.images.split(size))
        name = f"w{bits}a{bits}"
        return shipped(member, name, model.graph_module, member.graph.dynamic_batch)

    return step


def pruned(member: Member) -> Cell:
    """Thirty percent of the multiply-adds less, as an ONNX file."""
    options = StructureOptions(ratio=0.3, importance="magnitude")
    changed, _ = prune_structure(member.backbone, options, lambda: [member.images])
    graph = capture(changed)
    left = count_macs(graph.graph_module, member.backbone.preprocessing.size)
    return {"macs": left} | shipped(member, "pruned", graph.graph_module, graph.dynamic_batch)


def merged(member: Member) -> Cell:
    """A third of the tokens merged in three blocks, as an ONNX file."""
    changed, _ = merge_tokens(member.graph, MergeOptions(schedule="fast"))
    return shipped(member, "merged", changed.graph_module, changed.dynamic_batch)


def latency(member: Member) -> Cell:
    """The float and the 8-bit file, interleaved, one thread, batch 1."""
    missing = [name for name in ("fp32", "w8a8") if name not in member.files]
    if missing:
        raise DeploykitError(f"there is no {missing[0]} file to time")
    size = member.backbone.preprocessing.size
    float_run, int8_run = measure(
        TARGET,
        [("original", member.files["fp32"], "fp32"), ("compressed", member.files["w8a8"], "w8a8")],
        batch=1, input_shape=(3, size, size), threads=1, min_samples=64, min_seconds=1.0,
        max_seconds=60.0, warmup_seconds=1.0, seed=0,
    )  # fmt: skip
    return {
        "fp32_ms": float_run.p50_ms,
        "w8a8_ms": int8_run.p50_ms,
        "ratio": int8_run.ratio,
        "noisy": float_run.noisy or int8_run.noisy,
        "kernels": int8_run.kernels,
    }


def shipped(member: Member, name: str, graph_module: fx.GraphModule, dynamic: bool) -> Cell:
    """Export, and compare the file with the graph at two batch sizes."""
    path = member.folder / f"{name}.onnx"
    precision = name if name.startswith("w") else "fp32"
    source = Source(graph_module, member.backbone, precision, dynamic_batch=dynamic, metadata={})
    made = get_exporter("onnx").export(source, path)
    chooses = graph_module is not member.graph.graph_module and makes_choices(graph_module)
    floats = None
    if precision != "fp32" or chooses:
        floats = member.logits(member.graph.graph_module, member.graph.dynamic_batch)
    reference = make_reference(
        name, lambda x: in_batches(graph_module, x, len(x) if dynamic else 1), member.images,
        floats, 0, graph_module,
    )  # fmt: skip
    artifact = Artifact(
        name="compressed", format="onnx", path=path, bytes=path.stat().st_size, sha256="",
        precision=precision, weights="untrained", dynamic_batch=made.dynamic_batch,
    )  # fmt: skip
    runtime, run = read_by(TARGET, path)
    batches = BATCHES if made.dynamic_batch else BATCHES[:1]
    rows = [
        compare(
            artifact, runtime, batch, in_batches(run, member.images, batch), reference, "synthetic"
        )
        for batch in batches
    ]
    member.files[name] = path
    return {
        "passed": all(row.passed for row in rows),
        "sqnr_db": min(row.sqnr_db for row in rows),
        "noise_db": rows[0].noise_db,
        "tolerance": rows[0].tolerance,
        "batches": list(batches),
        "bytes": path.stat().st_size,
    }


STEPS: dict[str, Callable[[Member], Cell]] = {
    "capture": captured,
    "fp32": original,
    "w8a8": quantised(8),
    "latency": latency,
    "w4a4": quantised(4),
    "prune": pruned,
    "merge": merged,
}


@torch.no_grad()
def cells(name: str, img_size: int | None = None) -> Iterator[tuple[str, Cell]]:
    """Each step of a backbone: what came of it, or why nothing did.

    ``why`` is the product's own refusal; ``failed`` an error that it should have explained.
    """
    section = ModelSection(name=name, weights="random", img_size=img_size)
    backbone, _ = build_backbone(section, 0)
    with tempfile.TemporaryDirectory() as folder:
        member = Member(backbone, Path(folder))
        for step, take in STEPS.items():
            began = time.perf_counter()
            try:
                cell = take(member)
            except DeploykitError as error:
                cell = {"why": one_line(error)}
            except Exception as error:  # a suite goes on: the matrix shows it as a failure
                cell = {"failed": f"{type(error).__name__}: {one_line(error)}"}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            took = {"seconds": round(time.perf_counter() - began, 1), "peak_rss_bytes": peak}
            yield step, cell | took


def main() -> None:
    name, gigabytes = sys.argv[1], float(sys.argv[2])
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    for step, cell in cells(name):
        sys.stdout.write(json.dumps({"step": step, "cell": cell}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
