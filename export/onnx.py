"""Writing ONNX files: float graphs and quantised graphs alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import onnx
import onnx_ir as ir
import torch
from torch import fx

from deploykit.errors import DeploykitError, one_line, root_cause
from deploykit.export.onnx_exporters import OUTPUT_NAME, to_onnx
from deploykit.export.onnx_lowering import lowerings as own_lowerings
from deploykit.export.onnx_names import name_layers
from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import is_op
from deploykit.graph.levels import apart
from deploykit.types import Backbone

__all__ = ["Onnx", "lower_onnx", "onnx_bytes"]

_PROTOBUF_LIMIT = 2**31 - 2**20


@register_exporter("onnx")
class Onnx:
    """ONNX as ONNX Runtime's integer kernels want it: U8 activations, S8 weights."""

    name: str
    suffix: str = ".onnx"
    profile: Profile = "asymmetric"
    levels: bool = True

    def available(self) -> str | None:
        return None

    def export(self, source: Source, path: Path) -> Exported:
        """See ``Exporter.export``."""
        data, notes = lower_onnx(
            source.graph_module,
            source.backbone,
            dynamic_batch=source.dynamic_batch,
            metadata={**source.metadata, "precision": source.precision},
        )
        path.write_bytes(data)
        return Exported(source.precision, source.dynamic_batch, tuple(notes))

    def reader(self, path: Path) -> tuple[str, Reader] | None:  # noqa: ARG002
        """None: every runtime of the file is a target."""
        return None


def onnx_bytes(
    graph_module: fx.GraphModule,
    backbone: Backbone,
    *,
    dynamic_batch: bool = True,
    signed: bool = False,
    metadata: Mapping[str, str] | None = None,
    lowerings: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> bytes:
    """The file that ``lower_onnx`` makes."""
    return lower_onnx(
        graph_module,
        backbone,
        dynamic_batch=dynamic_batch,
        signed=signed,
        metadata=metadata,
        lowerings=lowerings,
    )[0]


def lower_onnx(
    graph_module: fx.GraphModule,
    backbone: Backbone,
    *,
    dynamic_batch: bool = True,
    signed: bool = False,
    metadata: Mapping[str, str] | None = None,
    lowerings: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
) -> tuple[bytes, list[str]]:
    """Lower a captured or quantised graph to one ONNX file, opset 21, weights inside.

    The input is ``image`` float32 (batch, 3, S, S), the output ``logits`` float32
    (batch, classes), or one output (batch, C, H, W) a feature map, by the name of its level; the
    metadata property ``levels`` has them in JSON. Weight codes are int8 initialisers, or packed
    int4 where 4 bits hold them. Convolutions and matrix products are named after layers.

    Args:
        signed: store grids around zero as int8 without a zero point, for runtimes that want it.
        metadata: written to the file's metadata properties, sorted, so equal inputs give equal
            bytes.
        lowerings: of further operators, by operator, as in ``onnx_lowering``.

    Returns:
        The file, and what the report should say of how it was made.

    Raises:
        DeploykitError: the exporter refused the graph, froze the batch, or the file would pass
            protobuf's 2 GiB.
    """
    size = backbone.preprocessing.size
    example = torch.zeros(2 if dynamic_batch else 1, 3, size, size)
    levels = [level.model_dump(mode="json") for level in backbone.levels]
    graph_module = apart(graph_module)
    try:
        model, notes = to_onnx(
            graph_module,
            example,
            dynamic_batch=dynamic_batch,
            table={**own_lowerings(signed=signed), **(lowerings or {})},
            outputs=[level.name for level in backbone.levels] or [OUTPUT_NAME],
        )
    except Exception as error:  # the exporters raise many unrelated types
        message = f"{backbone.name} can't be exported to ONNX: {one_line(root_cause(error))}"
        raise DeploykitError(message) from error
    name_layers(model, graph_module)
    _pack_four_bit(model, _four_bit_names(graph_module))
    _check_batch(model, backbone, dynamic_batch)
    _strip(model)
    said = {**(metadata or {}), **({"levels": json.dumps(levels)} if levels else {})}
    for key, value in sorted(said.items()):
        model.metadata_props[key] = value
    proto = ir.to_proto(model)
    if proto.ByteSize() > _PROTOBUF_LIMIT:
        message = f"{backbone.name} needs more than the 2 GiB one ONNX file can hold"
        raise DeploykitError(message)
    onnx.checker.check_model(proto)
    data = proto.SerializeToString(deterministic=True)
    assert isinstance(data, bytes)
    return data, notes


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
