"""What a model file says of its input: channels, height, width, and whether the batch is fixed.

Asked of the file itself, by the library of its format. Formats whose library can't be asked
here (engines, programs for phones) say nothing: the user gives the size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploykit.errors import TargetMissingError, UsageError, one_line
from deploykit.runtimes import import_openvino

__all__ = ["FileInput", "read_input"]

_DIMENSIONS = 4


@dataclass(frozen=True)
class FileInput:
    """The input of a file.

    Attributes:
        shape: channels, height, width; None for each that the file leaves open.
        batch: how many images it takes at a time; None for any number, or where it isn't said.
        precision: of the model, as the file's maker wrote it; empty where it isn't said.
    """

    shape: tuple[int | None, int | None, int | None] = (None, None, None)
    batch: int | None = None
    precision: str = ""


def read_input(path: Path) -> FileInput:
    """What the file at ``path`` says; nothing where its format can't be asked.

    Raises:
        UsageError: it can't be read, or its input is no batch of images.
        TargetMissingError: the library of its format is not installed.
    """
    if not path.exists():
        message = f"{path}: no such file"
        raise UsageError(message)
    reader = _READERS.get(path.suffix)
    return FileInput() if reader is None else reader(path)


def _from_dimensions(path: Path, dims: Sequence[int | None], precision: str) -> FileInput:
    if len(dims) != _DIMENSIONS:
        message = f"{path}: wanted images (batch, channels, height, width), it takes {list(dims)}"
        raise UsageError(message)
    batch, *shape = (size if size is not None and size > 0 else None for size in dims)
    return FileInput((shape[0], shape[1], shape[2]), batch, precision)


def _onnx(path: Path) -> FileInput:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's and onnx's own
        message = f"{path}: onnx cannot read it: {one_line(error)}"
        raise UsageError(message) from error
    weights = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in weights]
    if len(inputs) != 1:
        message = f"{path}: wanted a model with one input, it has {len(inputs)}"
        raise UsageError(message)
    dims = inputs[0].type.tensor_type.shape.dim
    said = {entry.key: entry.value for entry in model.metadata_props}
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    return _from_dimensions(path, sizes, said.get("precision", ""))


def _openvino(path: Path) -> FileInput:
    openvino = import_openvino()
    try:
        model = openvino.Core().read_model(str(path))
    except Exception as error:  # its exceptions share no base of their own
        message = f"{path}: openvino cannot read it: {one_line(error)}"
        raise UsageError(message) from error
    if len(model.inputs) != 1:
        message = f"{path}: wanted a model with one input, it has {len(model.inputs)}"
        raise UsageError(message)
    key = ["deploykit", "precision"]
    precision = model.get_rt_info(key).astype(str) if model.has_rt_info(key) else ""
    dims = [None if one.is_dynamic else one.get_length() for one in model.input(0).partial_shape]
    return _from_dimensions(path, dims, precision)


def _torch(path: Path) -> FileInput:
    from deploykit.export.structure import load_model

    saved = load_model(path)
    size = saved.backbone.preprocessing.size
    return FileInput((3, size, size), None if saved.dynamic_batch else 1, saved.precision)


def _coreml(path: Path) -> FileInput:
    from deploykit.targets.coreml import import_coremltools, quiet

    ct: Any = import_coremltools()
    try:
        with quiet():
            inputs = ct.models.MLModel(str(path), skip_model_load=True).get_spec().description.input
    except Exception as error:  # its exceptions share no base of their own
        message = f"{path}: coremltools cannot read it: {one_line(error)}"
        raise UsageError(message) from error
    array = inputs[0].type.multiArrayType
    dims: list[int | None] = [int(size) for size in array.shape]
    if dims and array.WhichOneof("ShapeFlexibility") is not None:
        dims[0] = None
    return _from_dimensions(path, dims, "")


def _if_installed(reader: Callable[[Path], FileInput]) -> Callable[[Path], FileInput]:
    """Nothing is said where the library is missing: the target will say that, and better."""

    def read(path: Path) -> FileInput:
        try:
            return reader(path)
        except TargetMissingError:
            return FileInput()

    return read


_READERS: dict[str, Callable[[Path], FileInput]] = {
    ".onnx": _onnx,
    ".xml": _if_installed(_openvino),
    ".torch": _torch,
    ".json": _torch,
    ".mlpackage": _if_installed(_coreml),
}
