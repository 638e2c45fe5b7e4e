"""Constants of an ONNX model, read and made."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["array_of", "constant_of", "new_constant", "scalar_of"]


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
