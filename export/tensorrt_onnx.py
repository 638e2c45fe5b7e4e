"""The ONNX dialect that TensorRT builds from, made out of the graph's own ONNX file.

TensorRT is strongly typed: what the file says is what runs. It wants signed activation codes
without a zero point, float biases, and a weight either int8 (for integer kernels) or int4 (which
is dequantised, so only where the activations are floats). All codes stay the graph's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from deploykit.errors import DeploykitError
from deploykit.export.tensorrt_half import to_half
from deploykit.export.tensorrt_split import split_packed_layers
from deploykit.export.tensorrt_types import (
    array_of,
    codes_of,
    constant_of,
    new_constant,
    scalar_of,
)

__all__ = ["Dialect", "to_dialect"]

LAYERS = ("Conv", "Gemm", "MatMul")
_SYMMETRIC_ZERO = 128
_HALF_NORMAL = 2.0**-14  # smaller float16 have fewer digits


@dataclass
class Dialect:
    """What was found on the way.

    Attributes:
        int4_layers: layers whose weights are stored as int4.
        integer_layers: layers and products whose inputs are both int8.
        fp8_layers: the same for FP8.
        tables: activations on a grid of unequal steps, looked up as floats.
        sparse_layers: layers that 2:4 sparse kernels can take.
        layers: layers with a weight, and products of two activations.
        notes: what the user should know.
    """

    int4_layers: int = 0
    integer_layers: int = 0
    fp8_layers: int = 0
    tables: int = 0
    sparse_layers: int = 0
    layers: int = 0
    notes: list[str] = field(default_factory=list)


def to_dialect(model: ir.Model, *, half: bool) -> Dialect:
    """Rewrite a model of ``deploykit.export.onnx`` in place.

    Args:
        half: compute floats in float16; normalisations and reductions stay float32.

    Raises:
        DeploykitError: an activation's codes don't fit int8 without a zero point.
    """
    found = Dialect()
    graph = model.graph
    for node in list(graph):
        if node.op_type == "DequantizeLinear":
            if _is_table(node):
                _table_as_floats(graph, node)
                found.tables += 1
            elif _producer(node, "QuantizeLinear") is not None:
                _drop_zero_point(graph, node)
    for node in list(graph):
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.dtype == ir.DataType.INT32:
            _bias_as_floats(graph, node)
    for node in list(graph):
        packed = _packed(node)
        if packed is not None:
            _place_codes(graph, node, packed, half, found)
    split = split_packed_layers(graph)
    if split:
        found.notes.append(f"{split} layers of query, key and value are three layers each")
    for node in list(graph):
        if node.op_type in LAYERS:
            _read_layer(node, found)
    _remove_unused(graph)
    if half:
        to_half(model)
        _remove_unused(graph)
    return found


def _producer(node: ir.Node, op_type: str, index: int = 0) -> ir.Node | None:
    value = node.inputs[index]
    source = None if value is None else value.producer()
    return source if source is not None and source.op_type == op_type else None


# ── activations ───────────────────────────────────────────────────────────────────────────────


def _drop_zero_point(graph: ir.Graph, dequantize: ir.Node) -> None:
    """Codes minus their zero point as int8.

    ``clip(round(x/s) + z) - z`` is ``round(x/s)`` clipped to a range moved by ``z``. Eight-bit
    codes fill the range of int8 only if ``z`` is 128. Narrower codes were clipped as floats
    before, and fit with any zero point.
    """
    quantize = _producer(dequantize, "QuantizeLinear")
    assert quantize is not None
    if quantize.outputs[0].dtype == ir.DataType.FLOAT8E4M3FN:
        return
    zero = int(scalar_of(quantize.inputs[2]))
    scale = float(scalar_of(quantize.inputs[1]))
    low, high = -zero, 255 - zero
    clip = _producer(quantize, "Clip")
    if clip is not None:
        least, most = (_bound(clip, index) for index in (1, 2))
        low = low if least is None else max(low, round(least / scale))
        high = high if most is None else min(high, round(most / scale))
    if low < -_SYMMETRIC_ZERO or high >= _SYMMETRIC_ZERO:
        message = (
            f"TensorRT wants signed activation codes without a zero point, and {quantize.name} "
            f"has zero point {zero}: quantise with symmetric activations"
        )
        raise DeploykitError(message)
    zero_point = new_constant(graph, f"{quantize.name}_zero", np.zeros((), np.int8))
    for node in (quantize, dequantize):
        node.replace_input_with(2, zero_point)
    quantize.attributes.pop("output_dtype", None)
    codes = quantize.outputs[0]
    codes.dtype = ir.DataType.INT8


def _bound(clip: ir.Node, index: int) -> float | None:
    value = clip.inputs[index] if len(clip.inputs) > index else None
    return None if constant_of(value) is None else float(scalar_of(value))


def _is_table(dequantize: ir.Node) -> bool:
    return _producer(dequantize, "Gather") is not None


def _table_as_floats(graph: ir.Graph, dequantize: ir.Node) -> None:
    """The looked-up values themselves: TensorRT has no unsigned codes to look up."""
    gather = _producer(dequantize, "Gather")
    assert gather is not None
    codes = array_of(gather.inputs[0]).astype(np.float32)
    step, zero = scalar_of(dequantize.inputs[1]), scalar_of(dequantize.inputs[2])
    values = ((codes - np.float32(zero)) * np.float32(step)).astype(np.float32)
    gather.replace_input_with(0, new_constant(graph, f"{dequantize.name}_values", values))
    gather.outputs[0].dtype = ir.DataType.FLOAT
    _replace(graph, dequantize, gather.outputs[0])


# ── weights and biases ────────────────────────────────────────────────────────────────────────


def _bias_as_floats(graph: ir.Graph, dequantize: ir.Node) -> None:
    codes, scale = (array_of(value) for value in dequantize.inputs[:2])
    bias = codes.astype(np.float32) * scale
    _replace(graph, dequantize, new_constant(graph, f"{dequantize.name}_bias", bias))


def _packed(node: ir.Node) -> ir.Value | None:
    """The int4 initialiser behind a weight's DequantizeLinear."""
    if node.op_type != "DequantizeLinear":
        return None
    cast = _producer(node, "Cast")
    value = None if cast is None else cast.inputs[0]
    return value if value is not None and value.dtype == ir.DataType.INT4 else None


def _place_codes(
    graph: ir.Graph, dequantize: ir.Node, packed: ir.Value, half: bool, found: Dialect
) -> None:
    """4-bit codes as int8 beside int8 activations, else as int4."""
    codes = array_of(packed).astype(np.int8)
    users = [user for user, _ in dequantize.outputs[0].uses()]
    integer = any(codes_of(user, 0) is not None for user in users)
    scale = array_of(dequantize.inputs[1])
    if integer or (half and not _scale_fits_half(codes, scale, _axis(dequantize))):
        wide = new_constant(graph, f"{dequantize.name}_codes", codes)
        dequantize.replace_input_with(0, wide)
        return
    if half:  # int4 has no kernel with a float32 scale and float16 values
        rounded = np.maximum(scale, _HALF_NORMAL).astype(np.float16)
        name = f"{dequantize.name}_scale_half"
        dequantize.replace_input_with(1, new_constant(graph, name, rounded))
        dequantize.outputs[0].dtype = ir.DataType.FLOAT16
    narrow = new_constant(graph, f"{dequantize.name}_codes", codes.astype(ml_dtypes.int4))
    dequantize.replace_input_with(0, narrow)
    found.int4_layers += len(users)


def _scale_fits_half(codes: NDArray[Any], scale: NDArray[Any], axis: int) -> bool:
    """Whether float16 holds the scale of every channel that isn't all zeros, to 11 digits."""
    others = tuple(i for i in range(codes.ndim) if i != axis % codes.ndim)
    used = scale[np.abs(codes).max(axis=others) > 0]
    return bool(np.all((used >= _HALF_NORMAL) & (used <= np.finfo(np.float16).max)))


def _axis(dequantize: ir.Node) -> int:
    attribute = dequantize.attributes.get("axis")
    return 1 if attribute is None else attribute.as_int()


# ── layers ────────────────────────────────────────────────────────────────────────────────────


def _read_layer(node: ir.Node, found: Dialect) -> None:
    found.layers += 1
    types = {codes_of(node, 0), codes_of(node, 1)}
    found.integer_layers += types == {ir.DataType.INT8}
    found.fp8_layers += types == {ir.DataType.FLOAT8E4M3FN}
    weight = _weight_of(node)
    if weight is not None and is_sparse(weight):
        found.sparse_layers += 1


def _weight_of(node: ir.Node) -> NDArray[Any] | None:
    """An ungrouped layer's weight, outputs on axis 0, inputs on 1; None for anything else.

    Codes stand for the weight: both have the same zeros.
    """
    value = node.inputs[1]
    source = None if value is None else value.producer()
    while source is not None and source.op_type in ("DequantizeLinear", "Cast", "Transpose"):
        if source.op_type == "Transpose":
            return None  # the exporter folds transposed constants, so this is an activation
        value = source.inputs[0]
        source = None if value is None else value.producer()
    groups = node.attributes.get("group")
    if constant_of(value) is None or (groups is not None and groups.as_int() != 1):
        return None
    weight = array_of(value)
    if node.op_type == "MatMul":
        return np.swapaxes(weight, 0, -1) if weight.ndim == 2 else None
    transposed = node.attributes.get("transB")
    if node.op_type == "Gemm" and (transposed is None or not transposed.as_int()):
        return weight.T
    return weight


def is_sparse(weight: NDArray[Any]) -> bool:
    """Whether of every four consecutive inputs at least two are zero, for every output.

    A weight of zeros alone isn't: nobody pruned it, and there is nothing to compute.

    Args:
        weight: (out, in, ...), any number type.
    """
    if weight.ndim < 2 or weight.shape[1] % 4 or not weight.size:
        return False
    moved = np.moveaxis(weight.astype(np.float32) != 0, 1, -1)  # int4 has no !=
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    return bool(0 < groups.sum(-1).max() <= 2)


# ── editing ───────────────────────────────────────────────────────────────────────────────────


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, value)
    graph.remove(node, safe=True)


def _remove_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
