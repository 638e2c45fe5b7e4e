"""ONNX Runtime on the CPU."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, UsageError, one_line
from deploykit.runtimes import import_onnxruntime, why_not
from deploykit.targets.registry import (
    FloatArray,
    Outputs,
    Runner,
    as_outputs,
    register_target,
    wanted_outputs,
)

__all__ = ["CpuOnnxRuntime", "open_session", "timed_options"]


_INT8 = ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger",
         "ConvInteger", "DynamicQuantizeMatMul")  # fmt: skip
_FLOAT = ("Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Attention",
          "MultiHeadAttention", "MatMulNBits")  # fmt: skip
_KERNELS = {name: f"int8 {name}" for name in _INT8} | {name: f"float {name}" for name in _FLOAT}


@register_target("cpu-onnxruntime")
class CpuOnnxRuntime:
    """The CPU provider with all graph optimisations; floats are computed in float32."""

    name: str
    formats: tuple[str, ...] = ("onnx",)
    exporter: str = "onnx"
    floats: str = "float32"

    def available(self) -> str | None:
        """None, or why onnxruntime cannot be imported."""
        return why_not(import_onnxruntime)

    def runtime(self) -> str:
        """Name, version and float precision."""
        return f"onnxruntime {import_onnxruntime().__version__}, float32"

    def kernels(self, path: Path) -> dict[str, int]:
        """Layers and matrix products after the runtime's own fusions, by kernel.

        Empty where there is no onnx to read the runtime's graph, as on a small remote device.

        Raises:
            TargetMissingError: onnxruntime is not installed.
        """
        onnxruntime = import_onnxruntime()
        try:
            import onnx
        except ImportError:
            return {}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            providers = ["CPUExecutionProvider"]
            onnxruntime.InferenceSession(str(path), options, providers=providers)
            nodes = onnx.load(options.optimized_model_filepath).graph.node
        return dict(Counter(_KERNELS[node.op_type] for node in nodes if node.op_type in _KERNELS))

    def load(self, path: Path, threads: int) -> Runner:
        """A session on ``threads`` threads.

        Raises:
            TargetMissingError: onnxruntime is not installed.
            UsageError: the file is not there, or is no model with one input.
        """
        session = open_session(path, timed_options(threads))
        inputs = session.get_inputs()
        if len(inputs) != 1:
            message = f"{path}: wanted a model with one input, it has {len(inputs)}"
            raise UsageError(message)
        return _Session(session, inputs[0].name, path)


def timed_options(threads: int) -> Any:
    """The session options that files are timed with.

    Raises:
        TargetMissingError: onnxruntime is not installed.
    """
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.use_deterministic_compute = True
    options.log_severity_level = 3  # errors only
    # Idle pool threads spin for 10 ms and more after a run, on the cores of the model timed
    # next. Stopped at the end of each run they cost nothing within it (measured: as fast as
    # the default); without any spinning, many small operators ran 20 % slower on two threads.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # By default the runtime quantises the activations of weight-only layers by itself.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def open_session(path: Path, options: Any) -> Any:
    """A session of the CPU provider.

    Raises:
        UsageError: the file is not there, or the runtime refuses it.
    """
    if not path.is_file():
        message = f"{path}: no such file"
        raise UsageError(message)
    try:
        return import_onnxruntime().InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base of their own
        message = f"{path}: onnxruntime cannot load it: {one_line(error)}"
        raise UsageError(message) from error


class _Session:
    def __init__(self, session: Any, input_name: str, path: Path) -> None:
        self._session = session
        self._input = input_name
        outputs = session.get_outputs()
        wanted = wanted_outputs([len(output.shape) for output in outputs])
        self._outputs = [outputs[index].name for index in wanted]
        self._path = path

    def __call__(self, images: FloatArray, /) -> Outputs:
        feed = {self._input: np.ascontiguousarray(images, dtype=np.float32)}
        try:
            outputs = self._session.run(self._outputs, feed)
        except Exception as error:
            message = f"{self._path}: onnxruntime failed on {images.shape}: {one_line(error)}"
            raise MeasurementError(message) from error
        made = tuple(np.asarray(output, dtype=np.float32) for output in outputs)
        return as_outputs(made)
