"""ONNX Runtime's own profile: events of every kernel of every call, in JSON."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import MeasurementError, UsageError, one_line
from deploykit.targets.cpu_onnxruntime import open_session, timed_options
from deploykit.targets.profiling.kernels import Kernel, Kind, without_endings
from deploykit.targets.profiling.ownership import SourceGraph, SourceNode
from deploykit.targets.registry import FloatArray

__all__ = ["OnnxRuntimeReader", "kernels_of_events", "onnx_source"]

_SUFFIX = "_kernel_time"
_COMPUTES = re.compile(r"Conv(Integer)?$|MatMul|Gemm|Attention")
_FILE_OPS = ("Conv", "MatMul", "Gemm")
_QUANTISES = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_REFORMATS = (
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "ReorderInput", "ReorderOutput",
    "Reshape", "Shape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
_DECORATION = re.compile(r"(_nchwc|_token_\d+|/[A-Za-z]*Fusion[^/]*)$")
_TYPES = {"float": "float32", "double": "float64"}
_INTEGERS = ("int8", "uint8")


class OnnxRuntimeReader:
    """The CPU provider, told what the timed sessions are told."""

    def kernels(self, path: Path, threads: int, images: FloatArray, calls: int) -> list[Kernel]:
        """See ``Reader.kernels``."""
        with tempfile.TemporaryDirectory() as folder:
            options = timed_options(threads)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = open_session(path, options)
            feed = {session.get_inputs()[0].name: images}
            for _ in range(calls + 1):
                session.run(None, feed)
            try:
                events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                message = f"{path}: ONNX Runtime's profile can't be read: {one_line(error)}"
                raise MeasurementError(message) from error
        found = kernels_of_events(events)
        if not found:
            message = f"{path}: ONNX Runtime's profile names no kernel"
            raise MeasurementError(message)
        return found

    def source(self, path: Path) -> SourceGraph:
        """See ``Reader.source``."""
        return onnx_source(path)

    def undecorated(self, name: str) -> list[str]:
        """See ``Reader.undecorated``."""
        return without_endings(name, _DECORATION)


def kernels_of_events(events: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """A profile's kernels in the order they ran, each with its median time.

    The first call is left out: it allocates and folds.
    """
    times: dict[str, list[float]] = defaultdict(list)
    facts: dict[str, tuple[str, str, str]] = {}
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") != "Node" or not str(event.get("name")).endswith(_SUFFIX):
            continue
        args = event.get("args", {})
        name, op = event["name"].removesuffix(_SUFFIX), str(args.get("op_name", ""))
        key = f"{args.get('node_index', '')}:{op}:{name}"  # names needn't be unique
        facts.setdefault(key, (name, op, _precision(op, args)))
        times[key].append(event["dur"] / 1e3)
    return [
        Kernel(key, name, op, _kind(op), precision, statistics.median(times[key][1:] or times[key]))
        for key, (name, op, precision) in facts.items()
    ]


def _kind(op: str) -> Kind:
    if _COMPUTES.search(op):
        return "compute"
    if op in _QUANTISES:
        return "quantise"
    return "reformat" if op in _REFORMATS else "other"


def _precision(op: str, args: Mapping[str, Any]) -> str:
    """Of the first input; the runtime lists each input as ``{type: shape}``."""
    inputs = args.get("input_type_shape") or [{}]
    if op == "QuantizeLinear":
        return "float32"
    first = next(iter(inputs[0]), "")
    return "int8" if first in _INTEGERS else _TYPES.get(first, first)


def onnx_source(path: Path) -> SourceGraph:
    """An ONNX file's operators. A computing one's layer is its own name.

    Raises:
        UsageError: it can't be read.
    """
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's and the system's
        message = f"{path}: wanted an ONNX file, it can't be read: {one_line(error)}"
        raise UsageError(message) from error
    names = [node.name or f"{node.op_type}_{index}" for index, node in enumerate(graph.node)]
    makers = {v: name for name, node in zip(names, graph.node, strict=True) for v in node.output}
    return SourceGraph(
        [
            SourceNode(
                name,
                name if node.op_type in _FILE_OPS else "",
                tuple(makers[value] for value in node.input if value in makers),
                tuple(node.output),
            )
            for name, node in zip(names, graph.node, strict=True)
        ]
    )
