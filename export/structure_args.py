"""Arguments of saved operators as plain JSON, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["BadArgumentError", "decode", "encode"]

_DEPTH = 4
_LONGEST = 100_000
_INT64 = 2**63

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    )
}  # fmt: skip
_NAMED: dict[str, dict[str, Any]] = {
    "dtype": _DTYPES,
    "device": {"cpu": torch.device("cpu")},
    "layout": {"strided": torch.strided},
    "memory_format": {
        "contiguous": torch.contiguous_format,
        "channels_last": torch.channels_last,
        "preserve": torch.preserve_format,
    },
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
}


class BadArgumentError(Exception):
    """An argument that can't be saved, or makes no sense; the message is one line."""


def encode(value: object) -> Any:
    """An argument as JSON: a node is ``{"node": name}``, a dtype ``{"dtype": name}``.

    Raises:
        BadArgumentError: a kind of argument that is not known.
    """
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float):
        return {"float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    for kind, names in _NAMED.items():
        for name, known in names.items():
            if type(known) is type(value) and known == value:
                return {kind: name}
    raise BadArgumentError(f"an argument of type {type(value).__name__}")


def decode(value: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """The argument that JSON stands for.

    Raises:
        BadArgumentError: it stands for nothing, is nested too deeply, or too long.
    """
    if isinstance(value, list):
        if depth == _DEPTH or len(value) > _LONGEST:
            raise BadArgumentError("a list that is too deep or too long")
        return [decode(item, nodes, depth + 1) for item in value]
    if isinstance(value, dict):
        return _named(value, nodes)
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise BadArgumentError("an integer of more than 64 bits")
    if isinstance(value, str) and (len(value) > 100 or not value.isascii()):
        raise BadArgumentError("a text that is too long or not ASCII")
    return value


def _named(value: dict[str, Any], nodes: Mapping[str, fx.Node]) -> Any:
    if len(value) == 1:
        ((kind, name),) = value.items()
        known: Mapping[str, Any] = nodes if kind == "node" else _NAMED.get(kind, {})
        if isinstance(name, str) and name in known:
            return known[name]
        if kind == "node":
            raise BadArgumentError(f"value {str(name)[:60]!r} is read before it is made")
    raise BadArgumentError(f"an argument {str(value)[:60]!r} that stands for nothing")
