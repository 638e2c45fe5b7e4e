"""torch's profiler of a compiled graph: Inductor's kernels, and the layers they can be told for.

Inductor calls libraries for convolutions and large products, one call each, and fuses the rest.
A call is the layer that has its shapes; layers of the same shapes are told apart by their order. A
fused kernel's name says what was fused into it, not for which layer: it counts for the next
layer to run. Its precision isn't told.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploykit.errors import MeasurementError, TargetMissingError
from deploykit.targets.cpu_torch_compiled import CpuTorchCompiled
from deploykit.targets.cuda_torch import CudaTorch
from deploykit.targets.profiling.kernels import Kernel
from deploykit.targets.profiling.ownership import SourceGraph
from deploykit.targets.profiling.torch_events import MOVES, kind_of, precision_of, profiled_call
from deploykit.targets.profiling.torch_shapes import Product, product_of, products_of_graph
from deploykit.targets.profiling.torch_source import graph_source
from deploykit.targets.registry import FloatArray, Runner
from deploykit.targets.torch_graph import read_graph

__all__ = ["CudaTorchReader", "TorchCompiledReader", "kernels_of_calls"]

_KERNEL = re.compile(r"(aten|deploykit|mkldnn|mkl|onednn)::|(graph_\d+_)?(cpp|triton)_")
_FUSED = re.compile(r"(?:graph_\d+_)?((?:cpp|triton_[a-z]+)_fused_(\w+?)(?:_\d+)?)$")
_MOVED = re.compile(rf"_?(({'|'.join(MOVES)}|convolution)_?)+$")
"""A fused kernel of a convolution lays out its weight or its input; the library computes it."""
_MULTIPLIES = re.compile(r"(^|_)(mm|bmm|addmm|baddbmm)(_|$)")


class TorchCompiledReader:
    """The graph compiled as the one that is timed, its fused kernels made visible.

    Compiling takes long, so a file is compiled once and not anew each time.
    """

    _gpu = False

    def __init__(self) -> None:
        self._loaded: dict[Path, Runner] = {}
        self._products: dict[tuple[Path, int], Mapping[str, Product]] = {}

    def kernels(self, path: Path, threads: int, images: FloatArray, calls: int) -> list[Kernel]:
        """See ``Reader.kernels``.

        Raises:
            TargetMissingError: there is no compiler or GPU, or this system's can't be profiled.
        """
        with self._visible():
            if path not in self._loaded:
                self._loaded[path] = self._load(path, threads)
            run = self._loaded[path]
            run(images)  # compiles
            named = profiled_call(lambda: run(images), gpu=self._gpu, shapes=True)
            timed = [
                profiled_call(lambda: run(images), gpu=self._gpu, shapes=False)
                for _ in range(calls)
            ]
        key = (path, len(images))
        if key not in self._products:
            self._products[key] = products_of_graph(read_graph(path).graph_module, images)
        found = kernels_of_calls(named, timed, self._products[key], gpu=self._gpu)
        if not found:
            raise MeasurementError(f"{path}: torch's profiler names no kernel of the same calls")
        return found

    def source(self, path: Path) -> SourceGraph:
        """See ``Reader.source``."""
        return graph_source(read_graph(path).graph_module)

    def undecorated(self, name: str) -> list[str]:  # noqa: ARG002  names are the nodes', or fused
        """See ``Reader.undecorated``: nothing is appended."""
        return []

    def _load(self, path: Path, threads: int) -> Runner:
        return CpuTorchCompiled().load(path, threads)

    def _visible(self) -> AbstractContextManager[object]:
        """Inductor's settings while it compiles and runs: its C++ kernels tell the profiler."""
        if sys.platform not in ("linux", "win32"):
            raise TargetMissingError(
                "torch's Inductor shows its kernels to the profiler on Linux and Windows only; "
                "profile there, or the same file on cpu-torch"
            )
        import torch._inductor.config as inductor

        patched: AbstractContextManager[object] = inductor.patch(
            {"cpp.enable_kernel_profile": True}
        )
        return patched


class CudaTorchReader(TorchCompiledReader):
    """The same on an NVIDIA GPU: the GPU's time for what each operator launched."""

    _gpu = True

    def _load(self, path: Path, threads: int) -> Runner:  # noqa: ARG002  a GPU has its own
        return CudaTorch().load_launched(path)


def kernels_of_calls(
    named: Iterable[Any],
    timed: Sequence[Iterable[Any]],
    products: Mapping[str, Product],
    *,
    gpu: bool,
) -> list[Kernel]:
    """What ran, in order, each with its median time. Nothing if the calls didn't run alike.

    Args:
        named: the events of a call whose inputs were kept, for shapes and types.
        timed: those of further calls, for times.
        products: of the graph's computing nodes.
        gpu: whether the GPU's time counts; else the CPU's does.
    """
    events = _outermost(named)
    names = [event.name for event in events]
    times: dict[int, list[float]] = defaultdict(list)
    for call in map(_outermost, timed):
        if [event.name for event in call] != names:
            return []
        for index, event in enumerate(call):
            times[index].append((event.device_time_total if gpu else event.cpu_time_total) / 1e3)
    found = [_kernel(index, event, times[index]) for index, event in enumerate(events)]
    computing = [index for index, kernel in enumerate(found) if kernel.kind == "compute"]
    nodes = _nodes([product_of(events[index]) for index in computing], products)
    for index, node in zip(computing, nodes, strict=True):
        if node:
            found[index] = replace(found[index], name=node)
    if len(products) > sum(map(bool, nodes)):  # the others may be in fused kernels
        found = [_computing_if_fused(kernel) for kernel in found]
    return [kernel for kernel in found if kernel.ms > 0] if gpu else found


def _outermost(events: Iterable[Any]) -> list[Any]:
    """The events of kernels that aren't part of another one."""
    found = []
    for event in events:
        parent = event.cpu_parent
        while parent is not None and not _KERNEL.match(parent.name):
            parent = parent.cpu_parent
        if parent is None and _KERNEL.match(event.name):
            found.append(event)
    return found


def _kernel(index: int, event: Any, times: Sequence[float]) -> Kernel:
    ms = statistics.median(times) if times else 0.0
    fused = _FUSED.match(event.name)
    if fused is None:
        operator, kind = event.name, kind_of(event.name)
        return Kernel(f"{index}:{operator}", operator, operator, kind, precision_of(event), ms)
    kind = "reformat" if _MOVED.match(fused[2]) else "other"
    return Kernel(f"{index}:{fused[1]}", fused[1], f"fused {fused[2].strip('_')}", kind, "", ms)


def _nodes(found: Sequence[Product | None], products: Mapping[str, Product]) -> list[str]:
    """The node of each product that was run; "" where its shapes are another number of nodes'."""
    nodes: dict[Product, list[str]] = defaultdict(list)
    for name, product in products.items():
        nodes[product].append(name)
    runs = {product: found.count(product) for product in nodes}
    left = {p: iter(names) for p, names in nodes.items() if len(names) == runs[p]}
    return ["" if p is None or p not in left else next(left[p]) for p in found]


def _computing_if_fused(kernel: Kernel) -> Kernel:
    """A product without a call of its own is in the kernel that bears its name."""
    fused = kernel.op.startswith("fused ") and _MULTIPLIES.search(kernel.op.removeprefix("fused "))
    return replace(kernel, kind="compute") if fused else kernel
