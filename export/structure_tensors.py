"""``model.safetensors`` beside a structure: what is in it, packed where weights are 2:4 sparse.

Of a packed tensor the file holds the half that isn't zero under its own name, and two bits a
value that say where it was under ``NAME.positions_2_4``. No runtime reads this; it is smaller.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load as load_tensors
from torch import Tensor

from deploykit.errors import UsageError, one_line
from deploykit.graph.two_four import is_two_of_four, pack_two_of_four, unpack_two_of_four

__all__ = ["DTYPES", "TensorEntry", "describe", "dtype_name", "pack", "read_tensors"]

DTYPES = frozenset({"float32", "float64", "int8", "uint8", "int32", "int64", "bool"})
_PACKED = frozenset({"float32", "float64", "int8"})
_POSITIONS = ".positions_2_4"


class TensorEntry(BaseModel):
    """A tensor as the graph reads it.

    Attributes:
        packing: ``2:4`` where the file holds two of each four entries along ``packed_axis``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    dtype: str
    shape: list[int] = Field(max_length=8)
    parameter: bool
    packing: Literal["2:4"] | None = None
    packed_axis: int = Field(default=1, ge=0, le=1)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def describe(tensors: Mapping[str, Tensor], parameters: set[str]) -> dict[str, TensorEntry]:
    """Every tensor's entry, by name. Outputs lie on axis 0, or on 1 where codes are transposed."""
    entries = {}
    for name, tensor in sorted(tensors.items()):
        entry = TensorEntry(
            dtype=dtype_name(tensor), shape=list(tensor.shape), parameter=name in parameters
        )
        if tensor.ndim > 1 and entry.dtype in _PACKED and f"{name}{_POSITIONS}" not in tensors:
            axes = [axis for axis in (1, 0) if is_two_of_four(tensor, axis)]
            if axes:
                entry = entry.model_copy(update={"packing": "2:4", "packed_axis": axes[0]})
        entries[name] = entry
    return entries


def pack(tensors: Mapping[str, Tensor], entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """The tensors as the file holds them."""
    stored = dict(tensors)
    for name, entry in entries.items():
        if entry.packing:
            values, positions = pack_two_of_four(tensors[name], entry.packed_axis)
            stored[name], stored[f"{name}{_POSITIONS}"] = values, positions
    return stored


def read_tensors(path: Path, entries: Mapping[str, TensorEntry], sha256: str) -> dict[str, Tensor]:
    """The tensors of a structure, unpacked.

    Raises:
        UsageError: what is missing, unreadable, or doesn't agree with the entries.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; it belongs beside structure.json")
    wanted = _stored(path, entries)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            names = set(file.keys())
            shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
        fault = sorted(names ^ set(wanted))
        if fault:
            what = "missing" if fault[0] in wanted else "not in the structure"
            raise UsageError(f"{path}: tensor {fault[0][:100]} is {what}")
        odd = [name for name in sorted(names) if shapes[name] != wanted[name][1]]
        if odd:
            message = f"tensor {odd[0]} is {shapes[odd[0]]}, the structure says {wanted[odd[0]][1]}"
            raise UsageError(f"{path}: {message}")
        data = path.read_bytes()
    except (safetensors.SafetensorError, OSError) as error:
        message = f"{path}: not a readable safetensors file ({one_line(error, 160)})"
        raise UsageError(message) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        message = "the tensors aren't those the structure was saved with (SHA-256 differs)"
        raise UsageError(f"{path}: {message}")
    tensors: dict[str, Tensor] = load_tensors(data)
    for name, tensor in tensors.items():
        if dtype_name(tensor) != wanted[name][0] or dtype_name(tensor) not in DTYPES:
            message = f"tensor {name} is {dtype_name(tensor)}, the structure says {wanted[name][0]}"
            raise UsageError(f"{path}: {message}")
    return {name: _unpacked(path, name, entry, tensors) for name, entry in entries.items()}


def _stored(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor that the file must hold."""
    wanted: dict[str, tuple[str, list[int]]] = {}
    for name, entry in entries.items():
        shape, axis = list(entry.shape), entry.packed_axis
        if entry.packing:
            fits = len(shape) > 1 and min(shape) > 0 and shape[axis] % 4 == 0
            if not fits or entry.dtype not in _PACKED or f"{name}{_POSITIONS}" in entries:
                raise UsageError(f"{path}: tensor {name[:100]} can't be packed as 2:4")
            groups = math.prod(shape) // 4
            wanted[f"{name}{_POSITIONS}"] = ("uint8", [-(-groups // 2)])
            shape[axis] //= 2
        wanted[name] = (entry.dtype, shape)
    return wanted


def _unpacked(path: Path, name: str, entry: TensorEntry, tensors: Mapping[str, Tensor]) -> Tensor:
    if not entry.packing:
        return tensors[name]
    try:
        return unpack_two_of_four(tensors[name], tensors[f"{name}{_POSITIONS}"], entry.packed_axis)
    except ValueError as error:
        raise UsageError(f"{path}: tensor {name[:100]}: {error}") from error
