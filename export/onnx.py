"""Writing ONNX files: float graphs and quantised graphs alike."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import onnx
import onnx_ir as ir
import torch
from torch import fx

from deploykit.errors import DeploykitError
from deploykit.export.onnx_lowering import OPSET, translation_table
from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import is_op
from deploykit.types import Backbone

__all__ = ["INPUT_NAME", "OUTPUT_NAME", "export_onnx", "onnx_bytes"]

INPUT_NAME, OUTPUT_NAME = "image", "logits"
_PROTOBUF_LIMIT = 2**31 - 2**20


def export_onnx(
    graph_module: fx.GraphModule,
    backbone: Backbone,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``onnx_bytes`` to ``path`` (not atomically: the caller writes aside)."""
    data = onnx_bytes(graph_module, backbone, dynamic_batch=dynamic_batch, metadata=metadata)
    Path(path).write_bytes(data)


def onnx_bytes(
    graph_module: fx.GraphModule,
    backbone: Backbone,
    *,
    dynamic_batch: bool = True,
    metadata: Mapping[str, str] | None = None,
    lowerings: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> bytes:
    """Lower a captured or quantised graph to one ONNX file, opset 21, weights inside.

    The input is ``image`` float32 (batch, 3, S, S), the output ``logits`` float32
    (batch, classes). Weight codes are int8 initialisers, or packed int4 where 4 bits hold them.

    Args:
        metadata: written to the file's metadata properties, sorted, so equal inputs give equal
            bytes.
        lowerings: of further operators, by operator, as in ``onnx_lowering``.

    Raises:
        DeploykitError: the exporter refused the graph, froze the batch, or the file would pass
            protobuf's 2 GiB.
    """
    size = backbone.preprocessing.size
    example = torch.zeros(2 if dynamic_batch else 1, 3, size, size)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if dynamic_batch else None
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(graph_module, (example,), dynamic_shapes=shapes)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                custom_translation_table={**translation_table(), **(lowerings or {})},
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises many unrelated types
        text = str(error).strip() or type(error).__name__
        message = f"{backbone.name} can't be exported to ONNX: {text.splitlines()[0]}"
        raise DeploykitError(message) from error
    assert exported is not None
    model = exported.model
    _pack_four_bit(model, _four_bit_names(graph_module))
    _check_batch(model, backbone, dynamic_batch)
    _strip(model)
    for key, value in sorted((metadata or {}).items()):
        model.metadata_props[key] = value
    proto = ir.to_proto(model)
    if proto.ByteSize() > _PROTOBUF_LIMIT:
        message = f"{backbone.name} needs more than the 2 GiB one ONNX file can hold"
        raise DeploykitError(message)
    onnx.checker.check_model(proto)
    data = proto.SerializeToString(deterministic=True)
    assert isinstance(data, bytes)
    return data


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and warnings out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _four_bit_names(graph_module: fx.GraphModule) -> set[str]:
    """Names of the buffers whose codes fit 4 bits; initialisers keep them."""
    return {
        str(node.args[0].target)
        for node in graph_module.graph.nodes
        if is_op(node, torch.ops.deploykit.dequantize.default) and node.args[3] <= 4
    }


def _pack_four_bit(model: ir.Model, names: set[str]) -> None:
    """Store 4-bit codes as packed INT4, with a Cast to int8 behind them.

    Runtimes fold the Cast of a constant when they load the file, and then see the int8 weight
    their integer kernels take: 4 bits on disk, int8 speed. A 4-bit tensor dequantised directly
    has no integer kernel and runs slower than float.
    """
    graph = model.graph
    for name in sorted(names):
        codes = graph.initializers.get(name)
        if codes is None:  # equal to another layer's: the exporter made them one
            continue
        assert codes.const_value is not None
        array = codes.const_value.numpy().astype(ml_dtypes.int4)
        packed = ir.Value(
            name=f"{name}_int4",
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.INT4),
            const_value=ir.Tensor(array, dtype=ir.DataType.INT4, name=f"{name}_int4"),
        )
        graph.register_initializer(packed)
        uses = list(codes.uses())
        cast = ir.node("Cast", [packed], {"to": ir.DataType.INT8}, name=f"{name}_to_int8")
        cast.outputs[0].name = f"{name}_int8"
        graph.insert_before(graph[0], cast)  # merged codes have readers anywhere
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
        graph.initializers.pop(name)


def _check_batch(model: ir.Model, backbone: Backbone, dynamic_batch: bool) -> None:
    shape = model.graph.inputs[0].shape
    batch = shape[0] if shape is not None else None
    if dynamic_batch and isinstance(batch, int):
        message = f"{backbone.name}: the exporter froze the batch at {batch}"
        raise DeploykitError(message)


def _strip(model: ir.Model) -> None:
    """Remove the exporter's debugging metadata: half the file at 4 bits, and stack traces."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
    model.doc_string = None
