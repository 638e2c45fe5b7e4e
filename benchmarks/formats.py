"""Every family in every format at every precision: exported, equal, how large, how fast.

    python benchmarks/formats.py
    python benchmarks/formats.py --models sht_vit_s4 --formats onnx coreml --bits w8a8

Untrained weights made lively: what is shown is whether the files are there and compute the same,
not accuracy. A cell that can't be says why. Sizes stand beside the least the weights could take:
their bits, packed. Writes ``benchmarks/results/formats.json`` and ``.md`` after each model; rows
of other models stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deploykit.artifacts import size_and_hash
from deploykit.backbones.build import build_backbone
from deploykit.environment import environment
from deploykit.errors import DeploykitError
from deploykit.export.parity import Reference, compare, make_reference
from deploykit.export.registry import Exporter, Source, get_exporter, list_exporters
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.quantized import QuantizedModel
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quantizing import SYMMETRY
from deploykit.recipe import ModelSection, parse_bits
from deploykit.targets.measure import measure
from deploykit.targets.registry import get_target, list_targets
from deploykit.types import Artifact

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = (
    "sht_vit_s4",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "tiny_vit_5m_224",
    "mobilevit_s",
    "convnext_tiny",
    "efficientformer_l1",
    "nextvit_small",
    "maxvit_tiny_tf_224",
    "pvt_v2_b0",
)
BITS = ("fp32", "w8a8", "w4a8", "w4a16")
IMAGES = 8


@dataclass
class Prepared:
    """A backbone, and its quantised graphs by bits and profile, each made once."""

    captured: CapturedModel
    pixels: torch.Tensor
    graphs: dict[tuple[str, str], tuple[CapturedModel | QuantizedModel, Reference]] = field(
        default_factory=dict
    )

    def at(self, bits: str, exporter: Exporter) -> tuple[CapturedModel | QuantizedModel, Reference]:
        """The graph at a width in an exporter's profile, and what files are compared with."""
        profile = exporter.profile if bits not in ("fp32", "w4a16") else "asymmetric"
        if (bits, profile) not in self.graphs:
            model: CapturedModel | QuantizedModel = self.captured
            if bits != "fp32":
                weights, inputs = (int(width) for width in bits[1:].split("a"))
                options = QuantizeOptions(
                    weights, inputs, symmetry=SYMMETRY[profile], bias_correction=False
                )
                model = quantize(self.captured, options, lambda: [self.pixels])
            floats = None
            if bits not in ("fp32", "w4a16"):
                floats = self.captured.graph_module(self.pixels)
            graph_module = model.graph_module
            reference = make_reference(bits, graph_module, self.pixels, floats, 0, graph_module)
            self.graphs[bits, profile] = (model, reference)
        return self.graphs[bits, profile]


def prepared(name: str) -> Prepared:
    """An untrained backbone and some noise for images."""
    backbone, _ = build_backbone(ModelSection(name=name, weights="random"), 0)
    size = backbone.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    return Prepared(capture(backbone), torch.randn(IMAGES, 3, size, size, generator=generator))


def least_bytes(model: Prepared, bits: str) -> int:
    """What the weights take at their bits, scales and all else left out."""
    parameters = sum(p.numel() for p in model.captured.backbone.module.parameters())
    return parameters * (32 if bits == "fp32" else int(bits[1])) // 8


@torch.no_grad()
def cell(model: Prepared, bits: str, name: str) -> dict[str, Any]:
    """One file: made, compared with its graph, and timed where a target here runs it."""
    exporter = get_exporter(name)
    if (reason := exporter.available()) is not None:
        return {"why": reason}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{exporter.suffix}"
        try:
            graph, reference = model.at(bits, exporter)
            source = Source(
                graph.graph_module,
                model.captured.backbone,
                bits,
                dynamic_batch=model.captured.dynamic_batch,
            )
            made = exporter.export(source, path)
            files = [p for p in Path(folder).iterdir() if p.name not in made.companions]
            facts: dict[str, Any] = {"precision": made.precision, "half": made.half}
            facts |= size_and_hash(files)
            facts["layers"], facts["notes"] = dict(made.layers), list(made.notes)
            artifact = Artifact(
                name="model", format=name, path=path, weights="untrained",
                precision=made.precision, half=made.half,
                bytes=facts["bytes"], sha256=facts["sha256"],
            )  # fmt: skip
            facts["parity"] = [
                compare(artifact, runtime, batch, logits, reference, "noise").model_dump(
                    mode="json"
                )
                for runtime, batch, logits in outputs(exporter, path, made.dynamic_batch, model)
            ]
            facts["latency"] = latencies(exporter, path, made.precision, model)
        except DeploykitError as error:
            return {"why": str(error), "seconds": round(time.perf_counter() - started, 1)}
    return {**facts, "seconds": round(time.perf_counter() - started, 1)}


def outputs(
    exporter: Exporter, path: Path, dynamic: bool, model: Prepared
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Logits by every runtime of a file here, at two batch sizes where it takes two."""
    runs: dict[str, Any] = dict([reader] if (reader := exporter.reader(path)) else [])
    for target in map(get_target, list_targets()):
        if target.exporter == exporter.name and target.available() is None:
            session = target.load(path, 1)
            runs[target.name] = lambda x, run=session: torch.from_numpy(run(x.numpy()))
    for runtime, run in runs.items():
        for batch in (1, IMAGES) if dynamic else (1,):
            yield runtime, batch, torch.cat([run(part) for part in model.pixels.split(batch)])


def latencies(
    exporter: Exporter, path: Path, precision: str, model: Prepared
) -> list[dict[str, Any]]:
    """One thread, batch 1, on each target here that prefers the format."""
    size = model.captured.backbone.preprocessing.size
    found = []
    for target in map(get_target, list_targets()):
        if target.exporter == exporter.name and target.available() is None:
            (timed,) = measure(
                target.name, [("model", path, precision)], batch=1, input_shape=(3, size, size),
                threads=1, min_samples=64, min_seconds=1.0, max_seconds=8.0, warmup_seconds=0.5,
                seed=0,
            )  # fmt: skip
            found.append({"target": target.name, "p50_ms": timed.p50_ms, "noisy": timed.noisy})
    return found


def markdown(data: dict[str, Any]) -> str:
    """The grid, and why a cell is empty."""
    where = data["environment"]
    lines = [
        f"Made by `python benchmarks/formats.py`; {where['cpu']}, {where['cores_allowed']} cores. "
        "Untrained weights; parity on noise against the graph each file was lowered from; p50 at "
        "batch 1 on one thread, not interleaved with the others: an impression, not a comparison.",
        "",
        "| model | precision | format | size, MB | least | parity, dB | equal | p50, ms |",
        "|:--|:--|:--|--:|--:|--:|:--|--:|",
    ]
    for row in data["rows"]:
        start = f"| {row['model']} | {row['bits']} | {row['format']} "
        if "why" in row:
            lines.append(f"{start}| – | {row['least_bytes'] / 1e6:.1f} | – | {row['why']} | – |")
            continue
        passed = all(p["passed"] for p in row["parity"])
        sqnr = min((float(p["sqnr_db"]) for p in row["parity"]), default=float("nan"))
        times = ", ".join(
            f"{t['p50_ms']:.1f}" + (" (noisy)" if t["noisy"] else "") for t in row["latency"]
        )
        verdict = ("yes" if passed else "**no**") if row["parity"] else "not run here"
        lines.append(
            f"{start}| {row['bytes'] / 1e6:.1f} | {row['least_bytes'] / 1e6:.1f} | {sqnr:.1f} "
            f"| {verdict} | {times or '–'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--formats", nargs="*", default=list_exporters())
    parser.add_argument("--bits", nargs="*", default=BITS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.results / "formats.json"
    old = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = {(r["model"], r["bits"], r["format"]): r for r in old}
    for name in args.models:
        model = prepared(name)
        for bits in args.bits:
            width = bits if bits == "fp32" else parse_bits(bits)
            for file_format in args.formats:
                row = {"model": name, "bits": width, "format": file_format}
                row |= {"least_bytes": least_bytes(model, width)}
                row |= cell(model, width, file_format)
                rows[name, width, file_format] = row
                sys.stderr.write(f"{name} {width} {file_format}: {_gist(row)}\n")
        data = {"environment": environment(), "rows": list(rows.values())}
        args.results.mkdir(exist_ok=True)
        file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (args.results / "formats.md").write_text(markdown(data), encoding="utf-8")


def _gist(row: dict[str, Any]) -> str:
    if "why" in row:
        return str(row["why"])
    passed = sum(p["passed"] for p in row["parity"])
    return f"{row['bytes'] / 1e6:.1f} MB, parity {passed} of {len(row['parity'])}"


if __name__ == "__main__":
    main()
