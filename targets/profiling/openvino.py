"""OpenVINO's counters: one average for each node of the compiled model, in whole microseconds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deploykit.errors import MeasurementError
from deploykit.runtimes import import_openvino
from deploykit.targets.cpu_openvino import compile_file, timed_options
from deploykit.targets.profiling.kernels import Kernel, Kind, without_endings
from deploykit.targets.profiling.ownership import SourceGraph, SourceNode
from deploykit.targets.registry import FloatArray

__all__ = ["OpenvinoReader", "kernel_kind", "kernel_precision"]

_COMPUTES = (
    "Convolution", "Deconvolution", "FullyConnected", "GroupConvolution", "MatMul",
    "ScaledDotProductAttention",
)  # fmt: skip
_QUANTISES = ("FakeQuantize", "Quantize", "Dequantize")
_REFORMATS = (
    "Broadcast", "Concat", "Convert", "Gather", "Pad", "Reorder", "Reshape", "Split",
    "StridedSlice", "Tile", "Transpose", "VariadicSplit",
)  # fmt: skip
_DECORATION = re.compile(r"/(WithoutBiases|Dequantization\w*|fq_\w+)$")
_TYPES = {
    "i8": "int8", "u8": "int8", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
}  # fmt: skip


class OpenvinoReader:
    """The CPU plugin, told what the timed model is told."""

    def kernels(self, path: Path, threads: int, images: FloatArray, calls: int) -> list[Kernel]:
        """See ``Reader.kernels``. The plugin rounds each call's time down to a microsecond."""
        compiled = compile_file(path, {**timed_options(threads), "PERF_COUNT": True})
        request = compiled.create_infer_request()
        request.infer([images], share_inputs=True)
        first = _averages(request)  # it makes the kernels for this shape
        for _ in range(calls):
            request.infer([images], share_inputs=True)
        found = []
        for key, (info, mean) in _averages(request).items():
            before = first[key][1] if key in first else 0.0
            ms = max((mean * (calls + 1) - before) / calls, 0.0)
            kind, precision = kernel_kind(info), kernel_precision(info.exec_type)
            found.append(Kernel(key, info.node_name, info.node_type, kind, precision, ms))
        if not found:
            raise MeasurementError(f"{path}: OpenVINO's counters name no kernel")
        return found

    def source(self, path: Path) -> SourceGraph:
        """See ``Reader.source``. A layer's name is that of its operator, as read from the file."""
        model = import_openvino().Core().read_model(str(path))
        nodes = []
        for node in model.get_ordered_ops():
            name, kind = node.get_friendly_name(), node.get_type_name()
            inputs = tuple(
                value.get_source_output().get_node().get_friendly_name() for value in node.inputs()
            )
            layer = _DECORATION.sub("", name) if kind in _COMPUTES else ""
            nodes.append(SourceNode(name, layer, inputs))
        return SourceGraph(nodes)

    def undecorated(self, name: str) -> list[str]:
        """See ``Reader.undecorated``."""
        return without_endings(name, _DECORATION)


def _averages(request: Any) -> dict[str, tuple[Any, float]]:
    """What was executed so far, in order, by a name that is made unique, and its mean ms."""
    found: dict[str, tuple[Any, float]] = {}
    for info in _executed(request.profiling_info):
        key = info.node_name
        while key in found:
            key += "'"
        found[key] = (info, info.real_time.total_seconds() * 1e3)
    return found


def _executed(infos: Iterable[Any]) -> list[Any]:
    return [info for info in infos if str(info.status).endswith("EXECUTED")]


def kernel_kind(info: Any) -> Kind:
    """What a node of the compiled model is, from its type."""
    if info.node_type.startswith(_COMPUTES):  # FullyConnectedQuantizedLegacy is one, too
        return "compute"
    if info.node_type in _QUANTISES or "/Dequantization" in info.node_name:
        return "quantise"
    return "reformat" if info.node_type in _REFORMATS else "other"


def kernel_precision(exec_type: str) -> str:
    """``int8`` from ``brgemm_avx512_I8``: what the plugin's implementation computes with."""
    ending = exec_type.rpartition("_")[2].lower()
    return _TYPES.get(ending, ending)
