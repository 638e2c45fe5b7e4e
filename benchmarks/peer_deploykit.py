"""deploykit's own quantisation, timed as the peers' is; the file is run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peer_common import SEED, Stopwatch
from deploykit.export.onnx import onnx_bytes
from deploykit.graph.capture import capture
from deploykit.quant.quantize import quantize
from deploykit.quantize_options import quantize_options
from deploykit.recipe import QuantizeSection
from deploykit.targets.registry import get_target
from deploykit.types import Backbone

NOTES = ["calibration seconds are those of quantize(), without export"]


def quantized_file(
    backbone: Backbone, images: Tensor, variant: str, folder: Path, watch: Stopwatch
) -> Path:
    """Quantise with a preset and write the file.

    Args:
        variant: widths and preset, such as ``w4a4 fast``.
    """
    bits, preset = variant.split()
    section = QuantizeSection.model_validate({"bits": bits, "preset": preset})
    captured = capture(backbone)
    watch.start()
    made = quantize(captured, quantize_options(section, SEED), lambda: images.split(16))
    watch.stop()
    path = folder / "model.onnx"
    path.write_bytes(onnx_bytes(made.graph_module, backbone, dynamic_batch=made.dynamic_batch))
    return path


def runner(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The file as a function from images (n, 3, S, S) to logits (n, classes)."""
    session = get_target("cpu-onnxruntime").load(path, threads)
    return lambda images: torch.from_numpy(session(images.numpy()))
