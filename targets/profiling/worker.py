"""The measuring process of profiles: ``python -m deploykit.targets.profiling.worker``.

The same protocol as ``targets/worker.py``. Files are profiled in turns, round after round, so that
drift of the machine hits all alike. Each round loads a file anew. Profilers slow small kernels
down, so a round's times are scaled to the median of the unprofiled calls just before it.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError
from deploykit.targets.answering import Emit, answer_request, end_with
from deploykit.targets.device import pin
from deploykit.targets.profiling.kernels import Kernel, Reader, get_reader
from deploykit.targets.profiling.ownership import owners, plain_layer
from deploykit.targets.protocol import time_calls
from deploykit.targets.registry import FloatArray, get_target

__all__ = ["COMMAND", "main"]

COMMAND = (sys.executable, "-P", "-m", "deploykit.targets.profiling.worker")

_LEAST_CALLS, _MOST_CALLS = 5, 100


def main() -> int:
    """Answer the request on standard input; exit code 0 when an answer was sent."""
    return answer_request(_profile)


def _profile(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    pin(request["cores"])
    threads, rounds = int(request["threads"]), int(request["rounds"])
    target, reader = get_target(request["target"]), get_reader(request["target"])
    paths = [Path(path) for path in request["files"]]
    shape = (request["batch"], *request["input_shape"])
    images: FloatArray = np.random.default_rng(request["seed"]).standard_normal(
        shape, dtype=np.float32
    )
    runners = [target.load(path, threads) for path in paths]
    for runner in runners:
        runner(images)  # allocates
    totals: list[list[float]] = [[] for _ in paths]
    found: list[list[list[Kernel]]] = [[] for _ in paths]
    for number in range(rounds):
        order = range(len(paths)) if number % 2 == 0 else reversed(range(len(paths)))
        for index in order:
            runner, seconds = runners[index], request["seconds"] / rounds
            call = partial(runner, images)
            calls = time_calls(call, seconds, least=_LEAST_CALLS, most=_MOST_CALLS)
            totals[index].append(statistics.median(calls))
            found[index].append(reader.kernels(paths[index], threads, images, len(calls)))
        emit({"event": "progress", "fraction": (number + 1) / rounds, "text": "profiling"})
    files = [
        {"total_ms": total, "kernels": _merged(path, reader, total, kernels)}
        for path, total, kernels in zip(paths, totals, found, strict=True)
    ]
    return {"files": files}


def _merged(
    path: Path, reader: Reader, totals: list[float], rounds: list[list[Kernel]]
) -> list[dict[str, Any]]:
    """Each kernel once, with its layer and its time in every round, scaled to that round's calls.

    A kernel that a round's counters don't name took no time in it.
    """
    by_key = [{kernel.key: kernel.ms for kernel in kernels} for kernels in rounds]
    scales = []
    for total, times in zip(totals, by_key, strict=True):
        seen = sum(times.values())
        if seen <= 0:
            raise MeasurementError(f"{path}: the profiler saw no time pass in any kernel")
        scales.append(total / seen)
    kernels = list({k.key: k for one in rounds for k in one}.values())
    graph = reader.source(path)
    layer_of = {node.name: plain_layer(node.layer) for node in graph.nodes}
    owned = owners(
        graph, [(k.name, reader.undecorated(k.name), k.kind == "compute") for k in kernels]
    )
    return [
        {
            "layer": layer_of.get(owner, ""),
            "node": owner,
            "name": kernel.name,
            "op": kernel.op,
            "kind": kernel.kind,
            "precision": kernel.precision,
            "ms": [
                scale * times.get(kernel.key, 0.0)
                for scale, times in zip(scales, by_key, strict=True)
            ],
        }
        for kernel, owner in zip(kernels, owned, strict=True)
    ]


if __name__ == "__main__":
    end_with(main)
