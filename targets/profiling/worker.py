"""The measuring process of profiles: ``python -m deploykit.targets.profiling.worker``.

The same protocol as ``targets/worker.py``. Files are profiled in turns, round after round, so that
drift of the machine hits all alike. Each round loads a file anew. Profilers slow small kernels
down, so a round's times are scaled to the median of the unprofiled calls just before it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError, MeasurementError
from deploykit.targets.device import pin
from deploykit.targets.ending import end_with
from deploykit.targets.profiling.kernels import Kernel, Reader, get_reader
from deploykit.targets.profiling.ownership import owners, plain_layer
from deploykit.targets.registry import FloatArray, Runner, get_target

__all__ = ["COMMAND", "main"]

COMMAND = (sys.executable, "-P", "-m", "deploykit.targets.profiling.worker")

_LEAST_CALLS, _MOST_CALLS = 5, 100
Emit = Callable[[dict[str, Any]], None]


def main() -> int:
    """Answer the request on standard input; exit code 0 when an answer was sent."""
    events = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # native libraries print on standard output, now on standard error

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        emit({"event": "result", "files": _profile(json.loads(sys.stdin.buffer.read()), emit)})
    except DeploykitError as error:
        emit({"event": "error", "kind": type(error).__name__, "message": str(error)})
    except MemoryError:
        emit({"event": "error", "kind": "MeasurementError", "message": "out of memory"})
    return 0


def _profile(request: dict[str, Any], emit: Emit) -> list[dict[str, Any]]:
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
            calls = _calls(runners[index], images, request["seconds"] / rounds)
            totals[index].append(statistics.median(calls))
            found[index].append(reader.kernels(paths[index], threads, images, len(calls)))
        emit({"event": "progress", "fraction": (number + 1) / rounds, "text": "profiling"})
    return [
        {"total_ms": total, "kernels": _merged(path, reader, total, kernels)}
        for path, total, kernels in zip(paths, totals, found, strict=True)
    ]


def _calls(runner: Runner, images: FloatArray, seconds: float) -> list[float]:
    runner(images)  # what ran before has taken the caches
    calls: list[float] = []
    started = time.perf_counter()
    while len(calls) < _LEAST_CALLS or (
        len(calls) < _MOST_CALLS and time.perf_counter() - started < seconds
    ):
        before = time.perf_counter_ns()
        runner(images)
        calls.append((time.perf_counter_ns() - before) / 1e6)
    return calls


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
