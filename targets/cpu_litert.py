"""LiteRT (TensorFlow Lite) with XNNPACK on this CPU."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, UsageError
from deploykit.targets.isolated import IsolatedTarget, one_by_one
from deploykit.targets.registry import FloatArray, Runner, one_line, register_target

__all__ = ["CpuLitert"]

_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL")


@register_target("cpu-litert")
class CpuLitert(IsolatedTarget):
    """Models as a phone runs them, on this machine's processor.

    A batch is its images one after another.
    """

    name: str
    formats: tuple[str, ...] = ("tflite",)
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
        interpreter = _interpreter(path, 1, plain=True)
        types = {one["index"]: np.dtype(one["dtype"]) for one in interpreter.get_tensor_details()}
        counts: Counter[str] = Counter()
        for operator in interpreter._get_ops_details():
            if operator["op_name"] in _PRODUCTS:
                source, weight = (types[index] for index in operator["inputs"][:2])
                counts[f"{_precision(source, weight)} {operator['op_name']}"] += 1
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


def _precision(source: np.dtype[Any], weight: np.dtype[Any]) -> str:
    if weight == np.float32:
        return "float"
    bits = f"int{weight.itemsize * 8}" if weight == np.int8 else "int4"
    return bits if source == np.int8 else f"{bits} dynamic"


def _interpreter(path: Path, threads: int, plain: bool = False) -> Any:
    """A ready interpreter; a plain one has no delegate and shows every operator."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kinds = OpResolverType
    resolver = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES if plain else kinds.AUTO
    try:
        interpreter = Interpreter(
            model_path=str(path), num_threads=threads, experimental_op_resolver_type=resolver
        )
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        message = f"{path}: litert cannot load it: {one_line(error)}"
        raise UsageError(message) from error
    return interpreter
