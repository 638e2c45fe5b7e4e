"""What an ONNX file must be before anything is made of it. Nothing large is read here.

A file is data from anywhere: its sizes are claims until they are checked, and the tensors it
keeps beside itself are paths that somebody else wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError

from deploykit.errors import UsageError

__all__ = [
    "LIMIT_VARIABLE",
    "OPSETS",
    "Limits",
    "check_file",
    "check_model",
    "external_file",
    "is_external",
    "parse",
    "read_bytes",
]

LIMIT_VARIABLE = "DEPLOYKIT_ONNX_MAX_BYTES"
OPSETS = range(11, 22)
_MAX_RANK = 8
_MAX_SIDE = 2**40  # beyond any real dimension; keeps the arithmetic on claims small

_ITEM_BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.DOUBLE: 8,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.BOOL: 1,
}
_TYPED_FIELD: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float_data",
    onnx.TensorProto.DOUBLE: "double_data",
    onnx.TensorProto.INT32: "int32_data",
    onnx.TensorProto.INT64: "int64_data",
    onnx.TensorProto.BOOL: "int32_data",
}
_QUANTISED_OPS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)


@dataclass(frozen=True)
class Limits:
    """Bounds on a foreign file.

    Attributes:
        file_bytes: of the ONNX file itself.
        tensor_bytes: of all its tensors together, those beside the file included.
        nodes: operators in the graph.
        seconds: wall and processor time its examination may take.
        memory_bytes: data the examination may hold, over and above ten times the tensors. Its
            address space may be 8 GiB larger: libraries map themselves into it.
    """

    file_bytes: int = 2**31
    tensor_bytes: int = 2**32
    nodes: int = 100_000
    seconds: int = 600
    memory_bytes: int = 4 * 2**30

    @classmethod
    def from_environment(cls) -> Limits:
        """The defaults, with DEPLOYKIT_ONNX_MAX_BYTES for the file and its tensors.

        Raises:
            UsageError: the variable isn't a positive whole number.
        """
        text = os.environ.get(LIMIT_VARIABLE)
        if not text:
            return cls()
        if not text.isdecimal() or int(text) == 0:
            raise UsageError(f"{LIMIT_VARIABLE}={text}: wanted a positive number of bytes")
        return cls(file_bytes=int(text), tensor_bytes=int(text))


def check_file(path: Path, limits: Limits) -> int:
    """The file's size in bytes.

    Raises:
        UsageError: no such file, no plain file, empty, or larger than the limit.
    """
    if not path.exists():
        raise UsageError(f"--model {path}: no such file; give an existing .onnx file")
    if not path.is_file():
        raise UsageError(f"--model {path}: not a plain file; give an .onnx file")
    size = path.stat().st_size
    if size == 0:
        raise UsageError(f"--model {path}: the file is empty")
    if size > limits.file_bytes:
        message = f"--model {path}: {size} bytes, but at most {limits.file_bytes} are read"
        raise UsageError(f"{message}; set {LIMIT_VARIABLE} to allow more")
    return size


def read_bytes(path: Path, limits: Limits) -> bytes:
    """The file's bytes, its size checked first.

    Raises:
        UsageError: as ``check_file``, or the file can't be read.
    """
    size = check_file(path, limits)
    try:
        with path.open("rb") as stream:
            data = stream.read(size + 1)
    except OSError as error:
        raise UsageError(f"--model {path}: can't be read ({error.strerror})") from error
    if len(data) != size:
        raise UsageError(f"--model {path}: the file changed while it was read")
    return data


def parse(data: bytes, path: Path) -> onnx.ModelProto:
    """The protobuf message; external tensors stay where they are.

    Raises:
        UsageError: the bytes aren't an ONNX model, or were cut short.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        message = f"--model {path}: not an ONNX file, or cut short; save or download it again"
        raise UsageError(message) from error
    if not proto.HasField("graph") or not proto.graph.node:
        raise UsageError(f"--model {path}: an ONNX file without a graph; is it cut short?")
    return proto


def check_model(proto: onnx.ModelProto, path: Path, limits: Limits) -> int:
    """Refuse what the reader can't or shouldn't take.

    Returns:
        Bytes of all tensors, as claimed and found.

    Raises:
        UsageError: the first thing that is wrong.
    """
    try:
        _check_opset(proto)
        _check_nodes(proto.graph, limits)
        _check_interface(proto.graph)
        return _check_tensors(proto, path.parent, limits)
    except _RefusedError as refusal:
        raise UsageError(f"--model {path}: {refusal}") from None


class _RefusedError(Exception):
    """Why a file is refused; the caller adds which file."""


def _check_opset(proto: onnx.ModelProto) -> None:
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is None:
        raise _RefusedError("it names no opset of the standard operators; export it again")
    if version not in OPSETS:
        wanted = f"{OPSETS[0]} to {OPSETS[-1]}"
        raise _RefusedError(f"opset {version}, but {wanted} are read; export it with one of these")
    if proto.functions:
        name = _short(proto.functions[0].name)
        raise _RefusedError(f"it defines functions of its own ({name}); inline them when exporting")


def _check_nodes(graph: onnx.GraphProto, limits: Limits) -> None:
    if len(graph.node) > limits.nodes:
        raise _RefusedError(f"{len(graph.node)} operators, but at most {limits.nodes} are read")
    if graph.sparse_initializer:
        raise _RefusedError("sparse tensors are not read; store them dense")
    for node in graph.node:
        what = _short(node.op_type)
        if node.op_type in _QUANTISED_OPS:
            raise _RefusedError(
                f"it is quantised already ({what}); give the float model it came from"
            )
        if node.domain not in ("", "ai.onnx"):
            where = _short(node.domain)
            message = f"operator {what} of the custom domain {where}; standard operators only"
            raise _RefusedError(f"{message}: export it without optimisation for one runtime")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                message = f"operator {what} holds a graph of its own (a branch or a loop)"
                raise _RefusedError(f"{message}, which is not read")
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise _RefusedError("sparse tensors are not read; store them dense")


def _check_interface(graph: onnx.GraphProto) -> None:
    initialisers = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initialisers]
    if len(inputs) != 1 or len(graph.output) != 1:
        message = f"{len(inputs)} inputs and {len(graph.output)} outputs"
        raise _RefusedError(f"{message}, but one image input and one logits output are wanted")
    tensor = inputs[0].type.tensor_type
    if tensor.elem_type != onnx.TensorProto.FLOAT:
        kind = _type_name(tensor.elem_type)
        raise _RefusedError(f"the input is {kind}, but float32 is wanted; export the float32 model")
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    if len(dims) != 4 or dims[1] not in (3, None):
        shape = "×".join("?" if d is None else str(d) for d in dims) or "unknown"
        raise _RefusedError(f"the input's shape is {shape}, but (N, 3, S, S) is wanted")
    if dims[0] not in (1, None):
        message = f"the batch is fixed at {dims[0]}"
        raise _RefusedError(f"{message}; export it with batch 1 or a free batch")
    if dims[2] != dims[3]:
        raise _RefusedError(f"the input is {dims[2]}×{dims[3]} pixels, but a square is wanted")
    if dims[2] is not None and not 0 < dims[2] <= 4096:
        raise _RefusedError(f"the input is {dims[2]} pixels wide, but 1 to 4096 are taken")


def _check_tensors(proto: onnx.ModelProto, folder: Path, limits: Limits) -> int:
    total = 0
    for tensor in _all_tensors(proto.graph):
        total += _tensor_bytes(tensor, folder)
        if total > limits.tensor_bytes:
            message = f"its tensors claim more than {limits.tensor_bytes} bytes"
            raise _RefusedError(f"{message}; set {LIMIT_VARIABLE} to allow more")
    return total


def _all_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _tensor_bytes(tensor: onnx.TensorProto, folder: Path) -> int:
    """The tensor's size; its dimensions, its type and what is stored must agree."""
    name = _short(tensor.name) or "a constant"
    item = _ITEM_BYTES.get(tensor.data_type)
    if item is None:
        kind = _type_name(tensor.data_type)
        raise _RefusedError(f"tensor {name} is {kind}; give the float32 model")
    if len(tensor.dims) > _MAX_RANK or any(not 0 <= d < _MAX_SIDE for d in tensor.dims):
        raise _RefusedError(f"tensor {name} claims the shape {_short(str(list(tensor.dims)))}")
    wanted: int = prod(tensor.dims) * item
    if is_external(tensor):
        offset, length, path = _external_file(tensor, folder)
        found = length if length is not None else wanted
        if offset + found > path.stat().st_size:
            raise _RefusedError(f"tensor {name} lies beyond the end of {path.name}")
    elif tensor.HasField("raw_data"):
        found = len(tensor.raw_data)
    else:
        found = len(getattr(tensor, _TYPED_FIELD[tensor.data_type])) * item
    if found != wanted:
        raise _RefusedError(f"tensor {name} claims {wanted} bytes, but {found} are stored")
    return wanted


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's values are in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def external_file(tensor: onnx.TensorProto, folder: Path) -> tuple[int, int | None, Path]:
    """Offset, length (None: as long as the shape says) and file of an external tensor.

    Raises:
        UsageError: the file isn't a plain file inside ``folder``, links followed.
    """
    try:
        return _external_file(tensor, folder)
    except _RefusedError as refusal:
        raise UsageError(f"--model {folder}: {refusal}") from None


def _external_file(tensor: onnx.TensorProto, folder: Path) -> tuple[int, int | None, Path]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = entries.get("location", "")
    shown = _short(place)
    parts = PurePosixPath(place).parts + PureWindowsPath(place).parts
    absolute = PurePosixPath(place).is_absolute() or PureWindowsPath(place).anchor
    if not place or absolute or ".." in parts or "\0" in place:
        message = f"external data {shown!r} must be a file in the model's own folder"
        raise _RefusedError(message)
    root = folder.resolve()
    try:
        path = (root / place).resolve(strict=True)
    except (OSError, RuntimeError):
        raise _RefusedError(
            f"external data {shown!r} is missing; keep it beside the model"
        ) from None
    if not path.is_relative_to(root) or not path.is_file():
        raise _RefusedError(f"external data {shown!r} must be a file in the model's own folder")
    offset, length = entries.get("offset", "0"), entries.get("length")
    if not _is_size(offset) or not (length is None or _is_size(length)):
        raise _RefusedError(f"external data {shown!r} has an offset or length that is no number")
    return int(offset), None if length is None else int(length), path


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 16


def _type_name(data_type: int) -> str:
    try:
        return str(onnx.TensorProto.DataType.Name(data_type)).lower()
    except ValueError:
        return f"of unknown type {data_type}"


def _short(text: str) -> str:
    """Somebody else's text, fit for one line."""
    plain = " ".join("".join(c if c.isprintable() else "?" for c in text).split())
    return plain if len(plain) <= 60 else f"{plain[:59]}…"
