"""LiteRT (TensorFlow Lite) with XNNPACK on this CPU."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, UsageError, one_line
from deploykit.targets.isolated import IsolatedTarget, one_by_one
from deploykit.targets.registry import FloatArray, Runner, register_target

__all__ = ["MobileLitert"]

# BuiltinOperator and TensorType of TensorFlow's schema.fbs
_PRODUCTS = {3: "Conv", 4: "DepthwiseConv", 9: "FullyConnected", 126: "BatchMatMul"}
_INT8, _INT4 = 9, 17


@register_target("mobile-litert")
class MobileLitert(IsolatedTarget):
    """Models as a phone runs them, on this machine's processor.

    A batch is its images one after another.
    """

    name: str
    formats: tuple[str, ...] = ("tflite",)
    exporter: str = "litert"
    floats: str = "float32"
    environment: str = "litert"

    def import_inside(self) -> None:
        """Import the interpreter."""
        import ai_edge_litert.interpreter  # noqa: F401

    def runtime_inside(self) -> str:
        """Name, version and float precision."""
        return f"litert {version('ai-edge-litert')} with XNNPACK, float32"

    def kernels_inside(self, path: Path) -> dict[str, int]:
        """Layers and products by the types of their input and weight.

        ``int8 dynamic`` and ``int4 dynamic`` layers choose their input's grid when they run.
        """
        from ai_edge_litert.tools import flatbuffer_utils

        model = flatbuffer_utils.read_model(path)
        counts: Counter[str] = Counter()
        for graph in model.subgraphs:
            types = [tensor.type for tensor in graph.tensors]
            for operator in graph.operators:
                entry = model.operatorCodes[operator.opcodeIndex]
                name = _PRODUCTS.get(max(entry.builtinCode, entry.deprecatedBuiltinCode))
                if name is not None:
                    source, weight = (types[index] for index in operator.inputs[:2])
                    counts[f"{_precision(source, weight)} {name}"] += 1
        return dict(counts)

    def load_inside(self, path: Path, threads: int) -> Runner:
        """An interpreter on ``threads`` threads.

        Raises:
            UsageError: the runtime refuses the file.
        """
        interpreter = _interpreter(path, threads)
        source = interpreter.get_input_details()[0]["index"]
        result = interpreter.get_output_details()[0]["index"]

        def run(image: FloatArray, /) -> FloatArray:
            try:
                interpreter.set_tensor(source, image)
                interpreter.invoke()
                return np.asarray(interpreter.get_tensor(result), dtype=np.float32)
            except (RuntimeError, ValueError) as error:
                message = f"{path}: litert failed on {image.shape}: {one_line(error)}"
                raise MeasurementError(message) from error

        return one_by_one(run)


def _precision(source: int, weight: int) -> str:
    bits = {_INT8: "int8", _INT4: "int4"}.get(weight, "float")
    return bits if bits == "float" or source == _INT8 else f"{bits} dynamic"


def _interpreter(path: Path, threads: int) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        message = f"{path}: litert cannot load it: {one_line(error)}"
        raise UsageError(message) from error
    return interpreter
