"""An ONNX graph as plain Python: nodes in order, and constants as arrays."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from deploykit.errors import UsageError
from deploykit.onnx_import.limits import external_file, is_external

__all__ = ["Array", "Graph", "Node", "digest", "read_graph", "used_external_files"]

Array = NDArray[Any]

_NOTHING_AT_INFERENCE = frozenset({"Identity", "Dropout"})


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        op: ONNX's name of it, or one of the fused layers of ``fuse.py``.
        name: the file's own name for the node, often the path of the module it came from.
        inputs: names of values; "" is an optional input left out.
        opset: version of the standard operators the file speaks.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    opset: int

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what it is if left out."""
        return self.attributes.get(name, default)


@dataclass
class Graph:
    """Nodes in an order that can be run.

    Attributes:
        constants: arrays by name.
        parameters: names of constants that the file stores as such (not computed ones).
        batch: 1 where the file fixes it, None where it is free.
        size: side of the square input in pixels, None where it is free.
    """

    input: str
    output: str
    nodes: list[Node]
    constants: dict[str, Array]
    batch: int | None
    size: int | None
    parameters: set[str] = field(default_factory=set)

    def users(self) -> dict[str, list[Node]]:
        """Who reads each value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in node.inputs:
                found.setdefault(name, []).append(node)
        return found

    def drop_dead(self) -> None:
        """Remove nodes nothing reads, and constants nothing reads any more."""
        needed = {self.output}
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        self.nodes = kept[::-1]
        self.constants = {name: a for name, a in self.constants.items() if name in needed}


def digest(data: bytes, outside: list[Path]) -> str:
    """SHA-256 of a file; with weights beside it, of the file and then their SHA-256s."""
    found = hashlib.sha256(data)
    for path in outside:
        with path.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()


def used_external_files(proto: onnx.ModelProto, folder: Path) -> list[Path]:
    """Files beside the model that hold its initialisers, sorted."""
    tensors = [tensor for tensor in proto.graph.initializer if is_external(tensor)]
    return sorted({external_file(tensor, folder)[2] for tensor in tensors})


def read_graph(proto: onnx.ModelProto, path: Path) -> Graph:
    """The graph of a model that ``limits.check_model`` has passed.

    Identities and dropout are gone.

    Raises:
        UsageError: values out of order (a cycle), defined twice, or never defined.
    """
    graph = proto.graph
    opset = next(e.version for e in proto.opset_import if e.domain in ("", "ai.onnx"))
    constants = {t.name: _array(t, path.parent) for t in graph.initializer}
    parameters = set(constants)
    image = next(value for value in graph.input if value.name not in constants)
    known, alias = {"", image.name, *constants}, dict[str, str]()
    nodes = []
    for position, raw in enumerate(graph.node):
        node = _node(raw, opset, path)
        if node.op in ("If", "Loop", "Scan"):
            raise UsageError(f"--model {path}: operator {node.op} is not read")
        missing = [name for name in node.inputs if name not in known]
        if missing:
            message = f"value {missing[0][:60]!r} is read before it is made (a cycle?)"
            raise UsageError(f"--model {path}: {message}")
        again = [name for name in node.outputs if name and name in known]
        if again or not node.outputs:
            raise UsageError(f"--model {path}: node {position} makes a value that is there already")
        known.update(node.outputs)
        node = replace(node, inputs=tuple(alias.get(name, name) for name in node.inputs))
        if node.op == "Constant":
            constants[node.outputs[0]] = _constant(node, path)
        elif node.op in _NOTHING_AT_INFERENCE:
            alias[node.outputs[0]] = node.inputs[0]
        else:
            nodes.append(node)
    result = graph.output[0].name
    result = alias.get(result, result)
    if result not in known or result in constants or result == image.name:
        raise UsageError(f"--model {path}: no operator makes its output {result[:60]!r}")
    dims = [
        d.dim_value if d.HasField("dim_value") else None for d in image.type.tensor_type.shape.dim
    ]
    return Graph(image.name, result, nodes, constants, dims[0], dims[2], parameters)


def _node(raw: onnx.NodeProto, opset: int, path: Path) -> Node:
    attributes = {}
    for attribute in raw.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = _array(value, path.parent)
        elif isinstance(value, bytes):
            value = value.decode("utf-8", errors="replace")
        attributes[attribute.name] = value
    return Node(raw.op_type, raw.name, tuple(raw.input), tuple(raw.output), attributes, opset)


def _constant(node: Node, path: Path) -> Array:
    for key, dtype in (("value_float", np.float32), ("value_floats", np.float32)):
        if key in node.attributes:
            return np.array(node.get(key), dtype)
    for key in ("value_int", "value_ints"):
        if key in node.attributes:
            return np.array(node.get(key), np.int64)
    value = node.get("value")
    if not isinstance(value, np.ndarray):
        raise UsageError(f"--model {path}: a Constant without a numeric value")
    return value


def _array(tensor: onnx.TensorProto, folder: Path) -> Array:
    if not is_external(tensor):
        return np.array(numpy_helper.to_array(tensor))
    offset, _, path = external_file(tensor, folder)
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    count = int(np.prod(tensor.dims, dtype=np.int64))
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise UsageError(f"external data {path}: the file changed while it was read")
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype).reshape(tuple(tensor.dims))
