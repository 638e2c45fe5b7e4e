"""Floats computed in float16, where that is sound.

The model keeps its float32 input and output. Codes are made from float16 values with float32
scales, so that the grids stay exactly the graph's (opset 23 lets the two types differ).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from deploykit.errors import DeploykitError
from deploykit.export.tensorrt_types import array_of, constant_of, new_constant

__all__ = ["to_half"]

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_OPSET, _IR_VERSION = 23, 11

_IN_FLOAT = (
    "LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization",
    "LpNormalization", "MeanVarianceNormalization", "ReduceMean", "ReduceSum", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSumExp", "CumSum", "Range", "Exp", "Pow", "Log",
)  # fmt: skip
"""Sums of many terms, squares and powers leave float16's range or digits."""

_CODE_OPS = ("Cast", "Clip", "Round", "Add", "Mul", "Sub", "Div", "Log", "Relu", "Where", "Less")
_FLOAT_INPUTS = {"QuantizeLinear": (1,), "DequantizeLinear": (1,), "Resize": (1, 2)}


def to_half(model: ir.Model) -> None:
    """Rewrite a float32 model in place; every value needs its type (as the exporter writes it)."""
    graph = model.graph
    _require_types(model)
    in_float = {id(node) for node in graph if node.op_type in _IN_FLOAT} | _code_chains(graph)
    _convert_constants(graph, in_float)
    for node in list(graph):
        if id(node) in in_float:
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", _HALF)
        elif node.op_type == "ConstantOfShape" and "value" in node.attributes:
            value = node.attributes["value"].as_tensor().numpy()
            if value.dtype == np.float32:
                half = ir.tensor(_as_half(value), name="value")
                node.attributes["value"] = ir.AttrTensor("value", half)
        elif node.op_type == "DequantizeLinear" and _dtype(node.inputs[1]) == _FLOAT:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", _HALF)
        for output in node.outputs:
            if output.dtype == _FLOAT:
                output.dtype = _HALF
    _cast_between(graph, in_float)
    _cast_outputs(graph)
    # 22 and 23 changed no operator used here but for the types it takes.
    graph.opset_imports[""] = max(_OPSET, graph.opset_imports[""])
    model.ir_version = max(_IR_VERSION, model.ir_version)


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None else value.dtype


def _require_types(model: ir.Model) -> None:
    """Types of values that the exporter's optimiser made without."""
    if all(value.dtype is not None for node in model.graph for value in node.outputs):
        return
    ShapeInferencePass()(model)
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and value.name:
                message = f"the type of {value.name} ({node.op_type}) is unknown: no float16"
                raise DeploykitError(message)


def _code_chains(graph: ir.Graph) -> set[int]:
    """Nodes that compute the index of a table's code, which must not fall on another side."""
    found: set[int] = set()
    pending = [node.inputs[1] for node in graph if node.op_type == "Gather"]
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        if node is None or node.op_type not in _CODE_OPS or id(node) in found:
            continue
        found.add(id(node))
        pending += node.inputs
    return found


def _stays_float(node: ir.Node, index: int, in_float: set[int]) -> bool:
    return id(node) in in_float or index in _FLOAT_INPUTS.get(node.op_type, ())


def _convert_constants(graph: ir.Graph, in_float: set[int]) -> None:
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != _FLOAT or constant_of(value) is None:
                continue
            if not _stays_float(node, index, in_float):
                _use_half(graph, value, node, index)


def _use_half(graph: ir.Graph, value: ir.Value, node: ir.Node, index: int) -> None:
    name = f"{value.name}_half"
    half = graph.initializers.get(name) or new_constant(graph, name, _as_half(array_of(value)))
    node.replace_input_with(index, half)


def _as_half(array: NDArray[Any]) -> NDArray[Any]:
    """Rounded; beyond the range, the largest; an epsilon never becomes 0."""
    limits = np.finfo(np.float16)
    half = np.clip(array, limits.min, limits.max).astype(np.float16)
    if array.size == 1 and array.reshape(-1)[0] != 0 and half.reshape(-1)[0] == 0:
        half = np.copysign(limits.smallest_subnormal, array).astype(np.float16)
    return half


def _cast_between(graph: ir.Graph, in_float: set[int]) -> None:
    """Casts where a float32 value is read as float16 or the other way round.

    A quantiser and a cast read either, so none stands before them.
    """
    casts: dict[tuple[int, ir.DataType], ir.Value] = {}
    for node in list(graph):
        if node.op_type in ("QuantizeLinear", "Cast"):
            continue
        wanted = _FLOAT if id(node) in in_float else _HALF
        for index, value in enumerate(node.inputs):
            if value is None or constant_of(value) is not None:
                continue
            if value.dtype in (_FLOAT, _HALF) and value.dtype != wanted:
                key = (id(value), wanted)
                if key not in casts:
                    casts[key] = _cast(graph, value, wanted, node)
                node.replace_input_with(index, casts[key])


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
    cast = ir.node("Cast", [value], {"to": to}, name=f"{value.name}_to_{to.name.lower()}")
    result = cast.outputs[0]
    result.name, result.shape, result.dtype = cast.name, value.shape, to
    graph.insert_before(before, cast)
    return result


def _cast_outputs(graph: ir.Graph) -> None:
    for index, value in enumerate(graph.outputs):
        if value.dtype != _HALF:
            continue
        name, value.name = value.name, f"{value.name}_half"
        cast = ir.node("Cast", [value], {"to": _FLOAT}, name=f"{name}_to_float")
        result = cast.outputs[0]
        result.name, result.shape, result.dtype = name, value.shape, _FLOAT
        graph.append(cast)
        graph.outputs[index] = result
