"""Constants of an ONNX model, read and made, and which values are codes."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["array_of", "codes_of", "constant_of", "new_constant", "scalar_of"]


_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice", "Identity")


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initialiser or of a Constant node, or None."""
    if value is None:
        return None
    return ir.convenience.get_const_tensor(value)


def array_of(value: ir.Value | None) -> NDArray[Any]:
    """A constant as an array; the caller knows that it is one."""
    tensor = constant_of(value)
    assert tensor is not None
    return tensor.numpy()


def scalar_of(value: ir.Value | None) -> Any:
    """The one element of a constant."""
    return array_of(value).reshape(-1)[0]


def new_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A new initialiser; its name is ``name`` or, if that is taken, one like it."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}_{count}", count + 1
    tensor = ir.tensor(array, name=unique)
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def codes_of(node: ir.Node, index: int) -> ir.DataType | None:
    """The type of the codes that an input is made from, perhaps moved around since."""
    value = node.inputs[index]
    source = None if value is None else value.producer()
    while source is not None and source.op_type in _MOVES:
        value = source.inputs[0]
        source = None if value is None else value.producer()
    if source is None or source.op_type != "DequantizeLinear":
        return None
    codes = source.inputs[0]
    if codes is not None and codes.dtype == ir.DataType.FLOAT8E4M3FN:
        return ir.DataType.FLOAT8E4M3FN
    return ir.DataType.INT8  # 4-bit codes become that beside int8
