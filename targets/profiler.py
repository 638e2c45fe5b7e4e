"""Where an ONNX file's time goes, layer by layer, by ONNX Runtime's own profiler.

Run as ``python -m deploykit.targets.profiler`` it is the measuring process, in the
worker's protocol; ``layer_times`` starts it and maps its answer to the file's layers.

A kernel's time counts for its layer, and so does the time of all kernels between it and the
layer before (norms, Q/DQ, reorders): the layers' times then add up to the whole model. The
profiler slows small kernels down, so all times are scaled to the median of unprofiled calls.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError, MeasurementError, UsageError, one_line
from deploykit.runtimes import import_onnxruntime
from deploykit.targets.child import ask
from deploykit.targets.cpu_onnxruntime import CpuOnnxRuntime
from deploykit.targets.device import pick_cores, pin
from deploykit.targets.ending import end_with
from deploykit.targets.registry import FloatArray

__all__ = ["layer_times", "main"]

COMMAND = (sys.executable, "-P", "-m", "deploykit.targets.profiler")

_FILE_OPS = ("Conv", "MatMul", "Gemm")
_KERNEL = re.compile(r"Conv(Integer)?$|MatMul|Gemm|Attention")
_DECORATION = re.compile(r"(_nchwc|_token_\d+|/.*)$")
_SUFFIX = "_kernel_time"
_LEAST_CALLS, _MOST_CALLS = 10, 200


def layer_times(
    path: Path,
    layers: Sequence[str],
    *,
    input_shape: tuple[int, int, int],
    batch: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """Milliseconds of each layer of one call, measured in a process of its own.

    Args:
        path: an ONNX file.
        layers: the layer of each convolution, Gemm and matrix product of the file, in order; a
            name may come more than once, and its times add up.
        input_shape: (channels, height, width) of the random images it is run on.
        seconds: spent on unprofiled calls, and about as much on profiled ones.

    Raises:
        UsageError: the file can't be loaded, or the runtime merged or split layers so that its
            kernels can't be told apart.
        MeasurementError: the measuring process failed.
        TargetMissingError: onnxruntime is not installed.
    """
    request = {
        "path": str(path.absolute()),
        "input_shape": list(input_shape),
        "batch": batch,
        "threads": threads,
        "cores": pick_cores(threads),
        "seconds": seconds,
        "seed": seed,
    }
    answer = ask(request, silence_seconds=600.0, command=COMMAND)
    kernels = [(str(name), str(op), float(ms)) for name, op, ms in answer["kernels"]]
    owners = _owners(path, layers, [name for name, op, _ in kernels if _KERNEL.search(op)])
    scale = float(answer["total_ms"]) / sum(ms for _, _, ms in kernels)
    times = dict.fromkeys(layers, 0.0)
    waiting, last = 0.0, ""
    for name, op, ms in kernels:
        waiting += ms
        if _KERNEL.search(op):
            last = owners[name]
            times[last] += waiting * scale
            waiting = 0.0
    times[last] += waiting * scale  # what follows the last layer
    return times


def _owners(path: Path, layers: Sequence[str], kernels: Sequence[str]) -> dict[str, str]:
    """The layer of each computing kernel: by name, and what is left over in order.

    The runtime names a kernel after the node it replaces, or (its NCHWc convolutions) after the
    value that comes out of it and of what was merged into it.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    by_name = {node.name: node for node in graph.node}
    computing = [node for node in graph.node if node.op_type in _FILE_OPS]
    if len(computing) != len(layers) or len(kernels) != len(computing):
        message = (
            f"{path.name}: can't map times to layers: {len(layers)} layers planned, "
            f"{len(computing)} computing nodes in the file, {len(kernels)} computing kernels in "
            "ONNX Runtime; measure on the device and give the times with --latency-table"
        )
        raise UsageError(message)
    layer_of = {node.name: layer for node, layer in zip(computing, layers, strict=True)}
    free, found = dict(layer_of), {}
    for kernel in kernels:
        bare = _DECORATION.sub("", kernel)
        node = by_name.get(kernel) or by_name.get(bare) or producers.get(bare)
        while node is not None and node.name not in layer_of:  # through a merged ReLU or norm
            sources = [producers[name] for name in node.input if name in producers]
            node = sources[0] if sources else None
        if node is not None and node.name in free:
            found[kernel] = free.pop(node.name)
    rest = [kernel for kernel in kernels if kernel not in found]
    return found | dict(zip(rest, free.values(), strict=True))


def main() -> int:
    """Answer the request on standard input; exit code 0 when an answer was sent."""
    events = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # native libraries print on standard output, now on standard error
    try:
        answer = {"event": "result", **_profile(json.loads(sys.stdin.buffer.read()))}
    except DeploykitError as error:
        answer = {"event": "error", "kind": type(error).__name__, "message": str(error)}
    events.write(json.dumps(answer) + "\n")
    events.flush()
    return 0


def _profile(request: dict[str, Any]) -> dict[str, Any]:
    pin(request["cores"])
    path, threads = Path(request["path"]), int(request["threads"])
    shape = (request["batch"], *request["input_shape"])
    images: FloatArray = np.random.default_rng(request["seed"]).standard_normal(
        shape, dtype=np.float32
    )
    runner = CpuOnnxRuntime().load(path, threads)
    runner(images)  # allocates
    calls: list[float] = []
    started = time.perf_counter()
    while len(calls) < _LEAST_CALLS or (
        len(calls) < _MOST_CALLS and time.perf_counter() - started < request["seconds"]
    ):
        before = time.perf_counter_ns()
        runner(images)
        calls.append((time.perf_counter_ns() - before) / 1e6)
    del runner
    return {
        "total_ms": statistics.median(calls),
        "kernels": _kernels(path, threads, images, len(calls)),
    }


def _kernels(
    path: Path, threads: int, images: FloatArray, calls: int
) -> list[tuple[str, str, float]]:
    """Name, operator and median milliseconds of every kernel, in the order they run."""
    onnxruntime = import_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.use_deterministic_compute = True
        options.log_severity_level = 3
        # As the timed sessions have it, lest other kernels be chosen here.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        feed = {session.get_inputs()[0].name: images}
        for _ in range(calls + 1):
            session.run(None, feed)
        try:
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{path}: ONNX Runtime's profile can't be read: {one_line(error)}"
            raise MeasurementError(message) from error
    times: dict[tuple[str, str], list[float]] = defaultdict(list)  # in the order they run
    for event in sorted(events, key=lambda event: event.get("ts", 0)):
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            key = (event["name"].removesuffix(_SUFFIX), str(event["args"].get("op_name", "")))
            times[key].append(event["dur"] / 1e3)
    if not times:
        message = f"{path}: ONNX Runtime's profile names no kernel"
        raise MeasurementError(message)
    # The first call allocates and folds.
    return [
        (name, op, statistics.median(taken[1:] or taken)) for (name, op), taken in times.items()
    ]


if __name__ == "__main__":
    end_with(main)
