"""ONNX Runtime's own static quantiser on the float ONNX file that deploykit writes.

Q/DQ format, weights int8 symmetric per channel, activations uint8 per tensor (U8S8). What is
measured is the file, run by ONNX Runtime; nothing here is a simulation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import deploykit.graph.ops  # noqa: F401  (registers the operators that the exporter knows)
from benchmarks.peer_common import Stopwatch
from deploykit.export.onnx import onnx_bytes
from deploykit.export.onnx_exporters import INPUT_NAME
from deploykit.graph.capture import capture
from deploykit.types import Backbone

NOTES = ["a real file, run by ONNX Runtime; attention matmuls included"]
EVERYTHING = None  # the quantiser's own default: every operator it knows, Add and Softmax too
MATMULS = ["Conv", "Gemm", "MatMul"]
VARIANTS: dict[str, tuple[Any, list[str] | None]] = {
    "minmax, all operators": (CalibrationMethod.MinMax, EVERYTHING),
    "minmax": (CalibrationMethod.MinMax, MATMULS),
    "percentile": (CalibrationMethod.Percentile, MATMULS),
    "entropy": (CalibrationMethod.Entropy, MATMULS),
}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration images one by one, as the quantiser asks for them."""

    def __init__(self, images: Tensor) -> None:
        self.left: Iterator[Tensor] = iter(images.split(1))

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.left, None)
        return None if image is None else {INPUT_NAME: image.numpy()}


def quantized_file(
    backbone: Backbone, images: Tensor, variant: str, folder: Path, watch: Stopwatch
) -> Path:
    """Write the float file, prepare it as the documentation asks, quantise it."""
    captured = capture(backbone)
    floats, prepared, out = (folder / f"{name}.onnx" for name in ("float", "prepared", "int8"))
    floats.write_bytes(
        onnx_bytes(captured.graph_module, backbone, dynamic_batch=captured.dynamic_batch)
    )
    method, operators = VARIANTS[variant]
    logging.disable(logging.WARNING)  # a line for each LayerNorm weight, which has no channel axis
    watch.start()
    quant_pre_process(str(floats), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(out),
        Reader(images),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=method,
        op_types_to_quantize=operators,
    )
    watch.stop()
    logging.disable(logging.NOTSET)
    return out


def runner(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """The file as a function from images (n, 3, S, S) to logits (n, classes)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        found = session.run(None, {INPUT_NAME: np.ascontiguousarray(images.numpy())})[0]
        return torch.from_numpy(found)

    return run
