"""The time of each layer of an ONNX file in ONNX Runtime, in the layers' own order.

A kernel's time counts for its layer, and so does the time of the kernels that work for it (norms,
Q/DQ, reorders): the layers' times then add up to the whole model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from deploykit.errors import UsageError
from deploykit.targets.profiling.kernels import get_reader
from deploykit.targets.profiling.profile import profile_files

__all__ = ["layer_times"]

_TARGET = "cpu-onnxruntime"


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
    (found,) = profile_files(
        _TARGET,
        [path],
        input_shape=input_shape,
        batch=batch,
        threads=threads,
        seconds=seconds,
        seed=seed,
    )
    nodes = [node.name for node in get_reader(_TARGET).source(path).nodes if node.layer]
    computing = [kernel.node for kernel in found.kernels if kernel.kind == "compute"]
    if len(nodes) != len(layers) or sorted(computing) != sorted(nodes):
        message = (
            f"{path.name}: can't map times to layers: {len(layers)} layers planned, "
            f"{len(nodes)} computing nodes in the file, {len(computing)} computing kernels in "
            "ONNX Runtime; measure on the device and give the times with --latency-table"
        )
        raise UsageError(message)
    medians = [statistics.median(kernel.ms) for kernel in found.kernels]
    scale = statistics.median(found.total_ms) / sum(medians)
    layer_of = dict(zip(nodes, layers, strict=True))
    times = dict.fromkeys(layers, 0.0)
    for kernel, ms in zip(found.kernels, medians, strict=True):
        times[layer_of[kernel.node]] += ms * scale
    return times
