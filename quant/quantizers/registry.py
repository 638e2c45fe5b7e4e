"""What an activation quantiser is, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, fx

from deploykit.quant.observers import Histogram

__all__ = [
    "ActivationQuantizer",
    "FittedQuantizer",
    "get_quantizer",
    "list_quantizers",
    "register_quantizer",
]


class FittedQuantizer(Protocol):
    """A quantiser with its parameters: a function, and a node of the quantised graph."""

    @property
    def bits(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """Quantise and dequantise, float32 in and out, any shape."""
        ...

    def insert(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Call the operator on ``node`` at the graph's insertion point."""
        ...

    def describe(self) -> dict[str, Any]:
        """Parameters for the report."""
        ...


class ActivationQuantizer(Protocol):
    """Fits one kind of grid to a whole tensor's histogram."""

    name: str

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> FittedQuantizer: ...


_REGISTRY: dict[str, ActivationQuantizer] = {}
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class _Register:
    name: str

    def __call__(self, cls: C) -> C:
        if self.name in _REGISTRY:
            message = f"a quantizer named {self.name!r} is registered already"
            raise ValueError(message)
        instance = cls()
        instance.name = self.name
        _REGISTRY[self.name] = instance
        return cls


def register_quantizer(name: str) -> Callable[[C], C]:
    """Class decorator: make a quantiser known by ``name``."""
    return _Register(name)


def get_quantizer(name: str) -> ActivationQuantizer:
    """The quantiser registered as ``name`` (KeyError if there is none)."""
    return _REGISTRY[name]


def list_quantizers() -> list[str]:
    return sorted(_REGISTRY)
