"""Running the ONNX that an engine was built from, on the CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from deploykit.errors import UsageError, one_line
from deploykit.export.registry import Reader
from deploykit.runtimes import import_onnxruntime

__all__ = ["ENGINE_HASH", "companion", "run_companion"]

ENGINE_HASH = "deploykit.engine_sha256"
NAME = "onnxruntime on the ONNX the engine was built from (not the engine)"


def companion(path: Path) -> Path:
    """Where the ONNX of the engine at ``path`` lies."""
    return path.with_name(f"{path.name}.onnx")


def run_companion(path: Path) -> tuple[str, Reader]:
    """The file beside an engine as a function, operator by operator as it is written.

    Raises:
        UsageError: it isn't there, can't be read, or belongs to another engine.
    """
    file = companion(path)
    try:
        model = ir.load(file)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except Exception as error:  # protobuf's exceptions and the operating system's
        text = one_line(error, 200)
        message = f"{file}, which the engine is checked by, can't be read: {text}; export again"
        raise UsageError(message) from error
    if model.metadata_props.get(ENGINE_HASH) != digest:
        message = f"{file} belongs to another engine than {path.name}; export again"
        raise UsageError(message)
    _cast_before_quantizers(model)
    return NAME, _session(ir.to_proto(model), file)


def _cast_before_quantizers(model: ir.Model) -> None:
    """ONNX Runtime wants a quantiser's input in the type of its scale; the cast is exact."""
    graph = model.graph
    for node in list(graph):
        value = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if value is None or value.dtype != ir.DataType.FLOAT16:
            continue
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{node.name}_cast")
        cast.outputs[0].name = cast.name
        graph.insert_before(node, cast)
        node.replace_input_with(0, cast.outputs[0])


def _session(proto: onnx.ModelProto, file: Path) -> Reader:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # its exceptions share no base of their own
        message = f"{file}: onnxruntime cannot load it: {' '.join(str(error).split())[:200]}"
        raise UsageError(message) from error
    name = session.get_inputs()[0].name

    def read(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return read
