"""A Core ML program (MIL) run in torch, on any system.

It shows that the file holds the right graph and the right numbers. It isn't the device: each
operator is computed in float32 and its result rounded to the type that the program declares, so a
float16 value that would overflow does, but a device may add in another order or precision.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploykit.errors import DeploykitError, UsageError, one_line
from deploykit.export import mil_layers as _layers  # noqa: F401  fills the table
from deploykit.export.coreml_package import load_program
from deploykit.export.mil_ops import OPERATORS, Call

__all__ = ["MilProgram"]


class MilProgram:
    """An ML program as a function: images float32 (N, 3, S, S) to logits float32 (N, classes).

    Operators that read only constants, such as those of compressed weights, run once.

    Args:
        path: an ``.mlpackage`` folder.

    Raises:
        TargetMissingError: coremltools is not installed.
        UsageError: ``path`` is no package.
        DeploykitError: the program can't be read, or has an operator that isn't known here.
    """

    def __init__(self, path: Path) -> None:
        self.spec, program = load_program(path)
        self._path = path
        function = program.functions["main"]
        if len(function.inputs) != 1 or len(function.outputs) != 1:
            message = f"{path}: wanted one input and one output, it has {len(function.inputs)} "
            message += f"and {len(function.outputs)}"
            raise DeploykitError(message)
        self._input = next(iter(function.inputs))
        self._output = function.outputs[0].name
        self._constants: dict[str, Any] = {}
        self._calls: list[Any] = []
        self.operators: Counter[str] = Counter()
        unknown = sorted({op.op_type for op in function.operations} - set(OPERATORS) - {"const"})
        if unknown:
            message = f"{path}: MIL operators not known in torch: {', '.join(unknown)}"
            raise DeploykitError(message)
        for op in function.operations:
            self._prepare(op)
        self._last_reader = self._last_readers()

    def _prepare(self, op: Any) -> None:
        if op.op_type == "const":
            self._constants[op.outputs[0].name] = _constant(op.outputs[0].val)
            return
        self.operators[op.op_type] += 1
        read = _names(op)
        if read and all(name in self._constants for name in read):
            self._run(op, self._constants)
        else:
            self._calls.append(op)

    def _last_readers(self) -> dict[str, int]:
        return {name: index for index, op in enumerate(self._calls) for name in _names(op)}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits of one batch.

        Raises:
            UsageError: the program doesn't take images of this shape.
            DeploykitError: an operator can't take what it is given.
        """
        self._check_shape(images)
        values = dict(self._constants)
        values[self._input] = images.float()
        for index, op in enumerate(self._calls):
            self._run(op, values)
            for name in _names(op):  # drop what nothing reads any more: a large batch is large
                if self._last_reader[name] == index and name != self._output:
                    values.pop(name, None)
        result = values[self._output]
        assert isinstance(result, Tensor)
        return result

    def _check_shape(self, images: Tensor) -> None:
        kind = self.spec.description.input[0].type.multiArrayType
        allowed = [(size, size) for size in kind.shape]
        if kind.shapeRange.sizeRanges:
            allowed = [(r.lowerBound, r.upperBound) for r in kind.shapeRange.sizeRanges]
        fits = len(allowed) == images.ndim and all(
            low <= size <= high for size, (low, high) in zip(images.shape, allowed, strict=True)
        )
        if not fits:
            wanted = " x ".join(str(a) if a == b else f"{a}..{b}" for a, b in allowed)
            message = f"{self._path}: wanted images of {wanted}, got {tuple(images.shape)}"
            raise UsageError(message)

    def _run(self, op: Any, values: dict[str, Any]) -> None:
        arguments = {key: _look_up(value, values) for key, value in op.inputs.items()}
        try:
            results = OPERATORS[op.op_type](Call(op, arguments))
        except Exception as error:  # torch raises many unrelated types
            message = f"{self._path}: {op.op_type} {op.name!r} failed: {one_line(error)}"
            raise DeploykitError(message) from error
        if not isinstance(results, list):
            results = [results]
        for var, value in zip(op.outputs, results, strict=True):
            values[var.name] = _as_declared(value, var)


def _names(op: Any) -> list[str]:
    found = []
    for value in op.inputs.values():
        found += list(value) if isinstance(value, list | tuple) else [value]
    return [var.name for var in found if var is not None]


def _look_up(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, list | tuple):
        return [values[var.name] for var in value]
    return None if value is None else values[value.name]


def _constant(value: Any) -> Any:
    """A constant as text, or as a tensor: floats as float32, integers as they are."""
    if isinstance(value, str | np.str_):
        return str(value)
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array.astype(np.bool_ if array.dtype.kind == "b" else np.int32))


def _as_declared(value: Tensor, var: Any) -> Tensor:
    """Rounded to float16 where that is the variable's type; anything else is left."""
    from coremltools.converters.mil.mil import types

    if value.is_floating_point() and var.dtype == types.fp16:
        return value.half().float()
    return value
