"""Attention's packed query, key and value layer as three layers.

TensorRT-RTX moves the slices behind such a layer in front of it, into the weight, and computes
the layer in float from then on, though its inputs are int8. Split beforehand, it stays int8. Each
output column is computed as before, so no result changes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploykit.export.tensorrt_types import array_of, codes_of, constant_of, new_constant

__all__ = ["split_packed_layers"]

_BETWEEN = ("Add", "Reshape", "Transpose")


def split_packed_layers(graph: ir.Graph) -> int:
    """Split, in place, each product of codes whose columns are taken apart.

    Returns:
        How many layers were split.
    """
    count = 0
    for node in list(graph):
        weight = _weight(node)
        parts = 0 if weight is None else _parts(node.outputs[0])
        if weight is not None and parts > 1 and array_of(weight.inputs[0]).shape[1] % parts == 0:
            _split(graph, node, weight, parts)
            count += 1
    return count


def _weight(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of a MatMul's stored (inputs, outputs) weight and of nothing else.

    None where the layer's input isn't codes.
    """
    if node.op_type != "MatMul" or node.inputs[1] is None or codes_of(node, 0) is None:
        return None
    source = node.inputs[1].producer()
    if source is None or source.op_type != "DequantizeLinear" or len(source.inputs) != 2:
        return None
    codes = constant_of(source.inputs[0])
    scale = constant_of(source.inputs[1])
    fits = codes is not None and scale is not None and len(codes.shape) == 2 == 1 + len(scale.shape)
    return source if fits and len(source.outputs[0].uses()) == 1 else None


def _parts(value: ir.Value) -> int:
    """How many slices are taken of a value, once it has its bias and is put in another shape."""
    users = [user for user, _ in value.uses()]
    while len(users) == 1 and users[0].op_type in _BETWEEN:
        users = [user for user, _ in users[0].outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Split":
        return len(users[0].outputs)
    return len(users) if all(user.op_type in ("Slice", "Gather") for user in users) else 0


def _split(graph: ir.Graph, node: ir.Node, weight: ir.Node, parts: int) -> None:
    codes = np.split(array_of(weight.inputs[0]), parts, axis=1)
    scales = np.split(array_of(weight.inputs[1]), parts)
    results = []
    for index, (own, scale) in enumerate(zip(codes, scales, strict=True)):
        name = f"{node.name}_part{index}"
        inputs = [
            new_constant(graph, f"{name}_codes", np.ascontiguousarray(own)),
            new_constant(graph, f"{name}_scale", np.ascontiguousarray(scale)),
        ]
        dequantize = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{name}_dequantize")
        _describe(dequantize, weight.outputs[0].dtype)
        product = ir.node("MatMul", [node.inputs[0], dequantize.outputs[0]], name=name)
        _describe(product, node.outputs[0].dtype)
        for new in (dequantize, product):
            graph.insert_before(node, new)
        results.append(product.outputs[0])
    joined = ir.node("Concat", results, {"axis": -1}, name=f"{node.name}_joined")
    _describe(joined, node.outputs[0].dtype)
    joined.outputs[0].shape = node.outputs[0].shape
    graph.insert_before(node, joined)
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, joined.outputs[0])
    graph.remove(node, safe=True)


def _describe(node: ir.Node, dtype: ir.DataType | None) -> None:
    node.outputs[0].name = node.name
    if dtype is not None:
        node.outputs[0].dtype = dtype
