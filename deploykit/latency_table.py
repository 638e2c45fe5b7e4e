"""Tables of every layer's time at every width: read from a file, or measured here."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.fsio import atomic_write_bytes
from deploykit.graph.capture import CapturedModel
from deploykit.images import Images
from deploykit.progress import Reporter
from deploykit.quant.plan import plan_layers
from deploykit.quant.quantize import quantize
from deploykit.quant.sensitivity import FLOAT_BITS
from deploykit.quantize_options import quantize_options
from deploykit.recipe import Recipe
from deploykit.targets.profiler import layer_times

__all__ = [
    "PLAIN",
    "LatencyTable",
    "dump_latency_table",
    "load_latency_table",
    "measure_latency_table",
]

LatencyTable = dict[str, dict[str, float]]
"""Layer to bits (``w8a8``, ``float``) to milliseconds."""

_MAX_BYTES = 64_000_000
PLAIN: dict[str, object] = {
    "preset": None,
    "time_budget_s": None,
    "rounding": "nearest",
    "reconstruction": "none",
    "bias_correction": False,
    "layer_bits": {},
}
"""What changes values but no kernel, and would cost minutes a width."""


def load_latency_table(path: Path) -> LatencyTable:
    """Read ``{layer: {bits: ms}}``, bare or under the key ``layers``.

    Raises:
        UsageError: the file can't be read or holds something else.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"{path}: wanted a latency table below 64 MB, got a larger file")
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UsageError(f"cannot read latency table {path}: {reason}") from error
    layers = data.get("layers", data) if isinstance(data, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise UsageError(f"{path}: wanted a latency table {{layer: {{bits: ms}}}}, got none")
    for layer, row in layers.items():
        good = isinstance(row, dict) and all(
            isinstance(ms, int | float) and not isinstance(ms, bool)
            and math.isfinite(ms) and ms >= 0
            for ms in row.values()
        )  # fmt: skip
        if not good:
            message = f"{path}: {layer}: wanted {{bits: milliseconds}}, got {row!r:.60}"
            raise UsageError(message)
    return {layer: {bits: float(ms) for bits, ms in row.items()} for layer, row in layers.items()}


def dump_latency_table(table: Mapping[str, Mapping[str, float]], facts: Mapping[str, Any]) -> str:
    """The text of a table's file, with how it was measured."""
    return json.dumps({"version": 1, **facts, "layers": table}, indent=2) + "\n"


def measure_latency_table(
    captured: CapturedModel,
    recipe: Recipe,
    candidates: Sequence[str],
    images: Images,
    reporter: Reporter,
) -> LatencyTable:
    """Time every layer with ONNX Runtime on this machine, in a model of each width throughout.

    Batch and threads are the recipe's (``measure``). The codes hardly matter to the time, so the
    models are quantised plainly, with one batch of images.

    Raises:
        UsageError: ONNX Runtime's kernels can't be told apart by layer.
        MeasurementError: the measuring process failed.
    """
    plans = plan_layers(captured.graph_module, 8, 8)
    layers = [plan.layer for plan in plans]
    table: LatencyTable = {layer: {} for layer in layers}
    size = captured.backbone.preprocessing.size
    measure = recipe.measure
    batch = next(iter(images.batches(recipe.calibration.batch_size)))
    for bits in candidates:
        with reporter.step(f"time each layer at {bits}"), tempfile.TemporaryDirectory() as folder:
            if bits == FLOAT_BITS:
                graph_module, dynamic = captured.graph_module, captured.dynamic_batch
                widths = [FLOAT_BITS] * len(layers)
            else:
                section = recipe.quantize.model_copy(update={**PLAIN, "bits": bits})
                made = quantize(captured, quantize_options(section), lambda: [batch])
                graph_module, dynamic = made.graph_module, made.dynamic_batch
                widths = [FLOAT_BITS if p.is_float else p.bits for p in made.plans]
            path = Path(folder) / "model.onnx"
            data = onnx_bytes(graph_module, captured.backbone, dynamic_batch=dynamic)
            atomic_write_bytes(path, data)
            times = layer_times(
                path,
                layers,
                input_shape=(3, size, size),
                batch=measure.batch_size,
                threads=measure.threads,
                seconds=min(measure.max_seconds, max(measure.min_seconds / 3, 0.1)),
                seed=recipe.seed,
            )
        for layer, width in zip(layers, widths, strict=True):
            # A layer kept wider than asked is timed more than once: the first model is uniform.
            table[layer].setdefault(width, times[layer])
    return table
