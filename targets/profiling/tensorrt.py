"""TensorRT's own profile: times by an ``IProfiler``, types by the engine's inspector."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploykit.errors import MeasurementError
from deploykit.targets.profiling.kernels import Kernel, Kind
from deploykit.targets.profiling.ownership import SourceGraph, SourceNode
from deploykit.targets.registry import FloatArray

__all__ = ["TensorrtReader", "engine_source", "kernels_of_engine"]

_PRODUCTS = ("conv", "gemm", "matmul", "mat_mul", "matrixmultiply", "matrix_multiply", "fc", "mha")
_TYPES = {
    "int8": "int8", "int4": "int4", "fp8": "float8", "half": "float16", "fp16": "float16",
    "bf16": "bfloat16", "bfloat16": "bfloat16", "float": "float32", "fp32": "float32",
    "int32": "int32", "int64": "int64", "bool": "bool",
}  # fmt: skip
_DATATYPE = re.compile(rf"(?:^|\s)({'|'.join(_TYPES)})(?:$|\s)")
_JOINED = re.compile(r"\s*\+\s*|\s*,\s*|\|\|")


class TensorrtReader:
    """The loaded engine, run with a profiler. Its names of layers are the network's, joined."""

    def kernels(self, path: Path, threads: int, images: FloatArray, calls: int) -> list[Kernel]:
        """See ``Reader.kernels``.

        Raises:
            TargetMissingError: a GPU or a library is missing.
            UsageError: the engine isn't for this GPU.
        """
        from deploykit.targets.cuda_tensorrt import CudaTensorrt

        runner: Any = CudaTensorrt().load(path, threads)
        library, information = runner.inspected()
        times: dict[str, list[float]] = defaultdict(list)
        profiler = _profiler(library, times)
        runner(images)  # binds and warms up
        runner.profile_with(profiler)
        for _ in range(calls):
            runner(images)
        found = kernels_of_engine(information, times)
        if not found:
            raise MeasurementError(f"{path}: TensorRT's profiler named no layer")
        return found

    def source(self, path: Path) -> SourceGraph:
        """See ``Reader.source``: the layers by the names that the engine gives them."""
        from deploykit.targets.cuda_tensorrt import CudaTensorrt

        runner: Any = CudaTensorrt().load(path, 1)
        return engine_source(runner.inspected()[1])

    def undecorated(self, name: str) -> list[str]:
        """See ``Reader.undecorated``: the parts of a merged layer, the last first."""
        return list(reversed(_parts(name)))


def _profiler(library: Any, times: dict[str, list[float]]) -> Any:
    class Profiler(library.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name].append(ms)

    return Profiler()


def kernels_of_engine(
    information: Mapping[str, Any], times: Mapping[str, Sequence[float]]
) -> list[Kernel]:
    """The inspector's layers with the profiler's times.

    Args:
        information: the inspector's JSON; ``Layers`` are objects where the engine was built with
            detailed profiling, else names.
        times: milliseconds of each layer's calls, by name, in the order of running.
    """
    layers = {
        str(layer.get("Name", "")): layer
        for layer in information.get("Layers", [])
        if isinstance(layer, dict)
    }
    return [
        Kernel(
            name,
            name,
            str(layers.get(name, {}).get("LayerType", "unknown")),
            _kind(name, layers.get(name, {})),
            _precision(layers.get(name, {})),
            statistics.median(taken),
        )
        for name, taken in times.items()
        if taken
    ]


def engine_source(information: Mapping[str, Any]) -> SourceGraph:
    """The multiplying layers as operators, each under the part of its name that multiplies."""
    nodes: list[SourceNode] = []
    seen: set[str] = set()
    for layer in information.get("Layers", []):
        name = str(layer.get("Name", "") if isinstance(layer, dict) else layer)
        facts = layer if isinstance(layer, dict) else {}
        if _kind(name, facts) != "compute":
            continue
        part = _parts(name)[0]
        if part and part not in seen:
            seen.add(part)
            nodes.append(SourceNode(part, part, ()))
    return SourceGraph(nodes)


def _parts(name: str) -> list[str]:
    return [part.strip("[] ") for part in _JOINED.split(name) if part.strip("[] ")] or [name]


def _kind(name: str, layer: Mapping[str, Any]) -> Kind:
    kind = str(layer.get("LayerType", "")).lower()
    title = f"{kind} {layer.get('TacticName', '')}".lower()
    if "foreignnode" in name.lower():
        return "compute"  # many layers compiled into one program: a row of its own
    if "reformat" in title or "reformatting copynode" in name.lower():
        return "reformat"
    if any(word in title for word in _PRODUCTS):
        return "compute"
    if "quantize" in title or ("scale" in kind and "quantize" in name.lower()):
        return "quantise"
    return "reformat" if kind in ("shuffle", "slice", "noop", "concatenation") else "other"


def _precision(layer: Mapping[str, Any]) -> str:
    """Of the first input: its text is a format such as ``Channel major FP32`` or ``Int8``."""
    inputs = layer.get("Inputs") or [{}]
    text = str(inputs[0].get("Format/Datatype", "")).lower()
    found = _DATATYPE.search(text)
    return _TYPES[found[1]] if found else ""
