"""OpenVINO on the CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, UsageError, one_line
from deploykit.runtimes import import_openvino, kept_signal_stack, why_not
from deploykit.targets.registry import (
    FloatArray,
    Outputs,
    Runner,
    as_outputs,
    register_target,
    wanted_outputs,
)

__all__ = ["CpuOpenvino", "compile_file", "timed_options"]


_PRECISION = {
    # the default is bfloat16 where the CPU has it, and then "float" would not be float32
    "INFERENCE_PRECISION_HINT": "f32",
    # the default quantises activations of weight-only models to 8 bit behind our back
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}
_FLOATS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
_LAYERS = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")


@register_target("cpu-openvino")
class CpuOpenvino:
    """The CPU plugin, told to compute in the precision that the file says."""

    name: str
    formats: tuple[str, ...] = ("onnx", "xml")
    exporter: str = "openvino"
    floats: str = "float32"

    def available(self) -> str | None:
        """None, or why openvino cannot be imported."""
        return why_not(import_openvino)

    def runtime(self) -> str:
        """Name, version and float precision."""
        version = str(import_openvino().get_version())
        return f"openvino {'-'.join(version.split('-')[:2])}, float32"

    def kernels(self, path: Path) -> dict[str, int]:
        """Layers and matrix products of the compiled model, by precision.

        Raises:
            TargetMissingError: openvino is not installed.
        """
        compiled = compile_file(path, _PRECISION)
        counts: Counter[str] = Counter()
        for node in compiled.get_runtime_model().get_ordered_ops():
            facts = node.get_rt_info()
            kind = facts["layerType"].astype(str)
            if kind in _LAYERS:
                integer = facts["runtimePrecision"].astype(str) in ("i8", "u8")
                counts[f"{'int8' if integer else 'float'} {kind}"] += 1
        return dict(counts)

    def load(self, path: Path, threads: int) -> Runner:
        """A compiled model on ``threads`` threads.

        Raises:
            TargetMissingError: openvino is not installed.
            UsageError: the file is not there, or is no model with one input.
        """
        compiled = compile_file(path, timed_options(threads))
        if len(compiled.inputs) != 1:
            message = f"{path}: wanted a model with one input, it has {len(compiled.inputs)}"
            raise UsageError(message)
        really = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        request = compiled.create_infer_request()
        return _Request(request, compiled.outputs, path, _FLOATS.get(really, really))


def timed_options(threads: int) -> dict[str, Any]:
    """What the CPU plugin is told when files are timed."""
    return {
        **_PRECISION,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # the caller pins the process; the plugin would pin to cores of its own choice
        "ENABLE_CPU_PINNING": False,
    }


def compile_file(path: Path, options: Mapping[str, Any]) -> Any:
    """A model compiled by the CPU plugin.

    Raises:
        TargetMissingError: openvino is not installed.
        UsageError: the file is not there, or the runtime refuses it.
    """
    openvino = import_openvino()
    if not path.is_file():
        message = f"{path}: no such file"
        raise UsageError(message)
    try:
        with kept_signal_stack():
            core = openvino.Core()
            return core.compile_model(core.read_model(str(path)), "CPU", dict(options))
    except Exception as error:  # its exceptions share no base of their own
        message = f"{path}: openvino cannot load it: {one_line(error)}"
        raise UsageError(message) from error


class _Request:
    def __init__(self, request: Any, outputs: Any, path: Path, precision: str) -> None:
        self.precision = precision
        """Of floats, as the compiled model says."""
        self._request = request
        wanted = wanted_outputs(
            [output.get_partial_shape().rank.get_length() for output in outputs]
        )
        self._outputs = [outputs[index] for index in wanted]
        self._path = path

    def __call__(self, images: FloatArray, /) -> Outputs:
        batch = np.ascontiguousarray(images, dtype=np.float32)
        try:
            # the input is read in place, as ONNX Runtime does; the outputs are copies
            found = self._request.infer([batch], share_inputs=True)
        except Exception as error:
            message = f"{self._path}: openvino failed on {images.shape}: {one_line(error)}"
            raise MeasurementError(message) from error
        made = tuple(np.asarray(found[one], dtype=np.float32) for one in self._outputs)
        return as_outputs(made)
