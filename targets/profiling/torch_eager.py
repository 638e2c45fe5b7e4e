"""torch's profiler of a saved graph that runs operator by operator: a range around each node."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import MeasurementError
from deploykit.targets.profiling.kernels import Kernel
from deploykit.targets.profiling.ownership import SourceGraph
from deploykit.targets.profiling.torch_events import (
    kind_of,
    operators_in,
    precision_of,
    profiled_call,
)
from deploykit.targets.profiling.torch_source import graph_source, operator_of
from deploykit.targets.registry import FloatArray
from deploykit.targets.torch_graph import GraphRunner, import_torch, read_graph, use_threads

__all__ = ["TorchReader", "kernels_of_ranges"]

_MARK = "deploykit node "
"""What the ranges of nodes begin with, lest an operator's own event be taken for one."""


class TorchReader:
    """The graph that is timed, run node by node in ranges that bear the nodes' names."""

    def kernels(self, path: Path, threads: int, images: FloatArray, calls: int) -> list[Kernel]:
        """See ``Reader.kernels``."""
        use_threads(threads)
        saved = read_graph(path)
        run = GraphRunner(path, saved, _in_ranges(saved.graph_module), "float32")
        run(images)  # allocates
        named = profiled_call(lambda: run(images), gpu=False, shapes=True)
        timed = [profiled_call(lambda: run(images), gpu=False, shapes=False) for _ in range(calls)]
        operators = {node.name: operator_of(node) for node in saved.graph_module.graph.nodes}
        found = kernels_of_ranges(operators, named, timed)
        if not found:
            raise MeasurementError(f"{path}: torch's profiler names no operator")
        return found

    def source(self, path: Path) -> SourceGraph:
        """See ``Reader.source``."""
        return graph_source(read_graph(path).graph_module)

    def undecorated(self, name: str) -> list[str]:  # noqa: ARG002  the names are the nodes'
        """See ``Reader.undecorated``: nothing is appended."""
        return []


def _in_ranges(graph_module: Any) -> Callable[[Any], Any]:
    torch: Any = import_torch()
    interpreter: Any = torch.fx.Interpreter

    class Ranges(interpreter):  # type: ignore[misc]
        def run_node(self, n: Any) -> Any:
            if not operator_of(n):
                return super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            with torch.profiler.record_function(_MARK + n.name):
                return n.target(*args, **kwargs)

    run: Callable[[Any], Any] = Ranges(graph_module).run
    return run


def kernels_of_ranges(
    operators: Mapping[str, str], named: Iterable[Any], timed: Iterable[Iterable[Any]]
) -> list[Kernel]:
    """The nodes in the order they ran, each with its median time.

    A node that calls no operator (the picking of one of several results) is none.

    Args:
        operators: of each node, as ``aten::linear``.
        named: the events of a call whose inputs were kept, for operators' names and types.
        timed: those of further calls, for times.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for events in timed:
        for event in _ranges(events):
            times[event.name].append(event.cpu_time_total / 1e3)
    found = []
    for event in _ranges(named):
        chain, taken = operators_in(event), times[event.name]
        name = event.name.removeprefix(_MARK)
        if chain and taken:
            kind, precision = kind_of(operators.get(name, "")), precision_of(chain[-1])
            ms = statistics.median(taken)
            found.append(Kernel(name, name, chain[-1].name, kind, precision, ms))
    return found


def _ranges(events: Iterable[Any]) -> list[Any]:
    return [event for event in events if event.name.startswith(_MARK)]
