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
    "require_supported",
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

    @property
    def name(self) -> str: ...

    def supports(self, low: float, high: float, /) -> bool:
        """Whether a tensor with these extremes can be quantised."""
        ...

    def fit(self, histogram: Histogram, bits: int, range_method: str) -> FittedQuantizer:
        """Choose the parameters.

        Args:
            histogram: of a whole tensor (one row).
            bits: 2 to 8.
            range_method: ``minmax`` keeps all values in range; the others search.

        Raises:
            ValueError: ``supports`` says no.
        """
        ...


def require_supported(quantizer: ActivationQuantizer, histogram: Histogram, takes: str) -> None:
    """Raise ValueError, saying what the quantiser ``takes``, unless it supports the histogram."""
    low, high = float(histogram.low[0]), float(histogram.high[0])
    if not quantizer.supports(low, high):
        message = f"{quantizer.name} quantises {takes}, got {low:g} to {high:g}"
        raise ValueError(message)


_REGISTRY: dict[str, ActivationQuantizer] = {}
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class _Register:
    name: str

    def __call__(self, cls: C) -> C:
        if self.name in _REGISTRY:
            message = f"a quantizer named {self.name!r} is registered already"
            raise ValueError(message)
        named: Any = cls
        named.name = self.name
        _REGISTRY[self.name] = named()
        return cls


def register_quantizer(name: str) -> Callable[[C], C]:
    """Class decorator: make a quantiser known by ``name``."""
    return _Register(name)


def get_quantizer(name: str) -> ActivationQuantizer:
    """The quantiser registered as ``name`` (KeyError if there is none)."""
    return _REGISTRY[name]


def list_quantizers() -> list[str]:
    return sorted(_REGISTRY)
