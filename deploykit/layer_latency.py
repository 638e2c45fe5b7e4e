"""Times of single layers on a target, for pruning that looks at time: one tiny ONNX file each.

Run as ``python -m deploykit.layer_latency`` it is the measuring process, in the targets' own
protocol. It loads all files, then goes over them in rounds, so that drift of the machine hits
all alike; a layer's time is its median over the rounds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.fsio import atomic_write_bytes
from deploykit.prune.latency import LayerShape
from deploykit.targets.answering import Emit, answer_request, end_with
from deploykit.targets.child import ask
from deploykit.targets.device import pick_cores, pin
from deploykit.targets.place import Here, place_of
from deploykit.targets.protocol import time_calls
from deploykit.targets.registry import get_target

__all__ = ["layer_file", "main", "measure_layers"]

COMMAND = (sys.executable, "-P", "-m", "deploykit.layer_latency")

_ROUNDS = 7
_LEAST_CALLS, _MOST_CALLS = 3, 50
_BURST_SECONDS = 0.004  # of one layer in one round
_OPSET = 17


def measure_layers(
    shapes: Sequence[LayerShape], *, target: str = "cpu-onnxruntime", threads: int = 1
) -> list[float]:
    """Milliseconds of each layer alone, for one image, in one process of its own.

    Raises:
        UsageError: the target doesn't load ONNX files or is on another device, or a layer can't
            be made.
        TargetMissingError: its runtime isn't there.
        MeasurementError: the measuring process failed.
    """
    chosen = get_target(target)
    if "onnx" not in chosen.formats:
        raise UsageError(f"layers are timed from ONNX files, which {target} doesn't load")
    if not isinstance(place_of(chosen), Here):
        raise UsageError(f"layers are timed on this machine only, {target} is on another device")
    reason = chosen.available()
    if reason is not None:
        raise TargetMissingError(reason)
    if not shapes:
        return []
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for index, shape in enumerate(shapes):
            path = Path(folder) / f"{index}.onnx"
            data, size = layer_file(shape)
            atomic_write_bytes(path, data)
            files.append([str(path), list(size)])
        request = {
            "target": target,
            "files": files,
            "threads": threads,
            "cores": pick_cores(threads),
        }
        answer = ask(request, silence_seconds=600.0, command=COMMAND)
    times = [float(ms) for ms in answer["ms"]]
    if len(times) != len(shapes):
        raise MeasurementError(f"wanted the times of {len(shapes)} layers, got {len(times)}")
    return times


def layer_file(shape: LayerShape) -> tuple[bytes, tuple[int, ...]]:
    """An ONNX file of one layer with random weights, and the shape of its input (float32).

    Raises:
        UsageError: the kind of layer is unknown.
    """
    if shape.kind == "linear":
        return _linear(shape)
    if shape.kind in ("conv", "depthwise"):
        return _conv(shape)
    if shape.kind == "attention":
        return _attention(shape)
    raise UsageError(f"no layer of kind {shape.kind!r:.40} can be timed")


def _linear(shape: LayerShape) -> tuple[bytes, tuple[int, ...]]:
    (tokens,), (inputs, outputs) = shape.fixed, shape.sizes
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    return _file(nodes, (1, tokens, inputs), {"weight": (inputs, outputs), "bias": (outputs,)})


def _conv(shape: LayerShape) -> tuple[bytes, tuple[int, ...]]:
    side, side_out, kernel, stride = shape.fixed
    channels, outputs = shape.sizes[0], shape.sizes[-1]
    groups = channels if shape.kind == "depthwise" else 1
    padding = max(0, (side_out - 1) * stride + kernel - side)
    before, after = padding // 2, padding - padding // 2
    node = helper.make_node(
        "Conv", ["x", "weight", "bias"], ["y"], group=groups, strides=[stride, stride],
        kernel_shape=[kernel, kernel], pads=[before, before, after, after],
    )  # fmt: skip
    weight = (outputs, channels // groups, kernel, kernel)
    return _file([node], (1, channels, side, side), {"weight": weight, "bias": (outputs,)})


def _attention(shape: LayerShape) -> tuple[bytes, tuple[int, ...]]:
    """Queries, keys and values cut from one tensor, two products, a softmax between."""
    (windows, queries, keys), (heads, qk, v) = shape.fixed, shape.sizes
    ends = np.array([0, qk, 2 * qk, 2 * qk + v])
    constants: dict[str, NDArray[np.int64]] = {"axes": np.array([2, 3])}
    nodes = []
    for index, (name, tokens) in enumerate((("q", queries), ("k", keys), ("v", keys))):
        constants[f"{name}_start"] = np.array([0, ends[index]])
        constants[f"{name}_end"] = np.array([tokens, ends[index + 1]])
        cut = ["x", f"{name}_start", f"{name}_end", "axes"]
        nodes.append(helper.make_node("Slice", cut, [name]))
    nodes += [
        helper.make_node("Transpose", ["k"], ["k_t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "k_t"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    return _file(nodes, (windows, heads, max(queries, keys), 2 * qk + v), {}, constants)


def _file(
    nodes: list[onnx.NodeProto],
    size: tuple[int, ...],
    weights: dict[str, tuple[int, ...]],
    constants: dict[str, NDArray[np.int64]] | None = None,
) -> tuple[bytes, tuple[int, ...]]:
    rng = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array((rng.standard_normal(dims) * 0.02).astype(np.float32), name)
        for name, dims in weights.items()
    ]
    tensors += [
        numpy_helper.from_array(value.astype(np.int64), name)
        for name, value in (constants or {}).items()
    ]
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(size))],
        tensors,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model.SerializeToString(), size


def main() -> int:
    """Answer the request on standard input; exit code 0 when an answer was sent."""
    return answer_request(_times)


def _times(request: dict[str, Any], _emit: Emit) -> dict[str, list[float]]:
    pin(request["cores"])
    target, rng = get_target(request["target"]), np.random.default_rng(0)
    loaded = []
    for path, size in request["files"]:
        runner = target.load(Path(path), int(request["threads"]))
        image = rng.standard_normal(tuple(size), dtype=np.float32)
        runner(image)  # allocates
        loaded.append((runner, image))
    rounds: list[list[float]] = [[] for _ in loaded]
    for _ in range(_ROUNDS):
        for (runner, image), medians in zip(loaded, rounds, strict=True):
            call = partial(runner, image)
            calls = time_calls(call, _BURST_SECONDS, least=_LEAST_CALLS, most=_MOST_CALLS)
            medians.append(statistics.median(calls))
    return {"ms": [statistics.median(medians) for medians in rounds]}


if __name__ == "__main__":
    end_with(main)
