"""How far a graph moves by the rounding of its own floats: the measure for float files.

A float16 file can't be as near to the float32 model as a float32 file. Each weight and each
intermediate value is rounded to 11 bits, an error about 73 dB below the value, and what comes of
that at the logits depends on the model: tens of decibels lie between a well-trained transformer and
a network whose sums cancel. So the tolerance is measured and not fixed: the same rounding is done
in torch, and a file may have at most twice that noise's amplitude (6 dB), because it fuses and
orders the operators differently.

The same holds of float32, where a network amplifies its rounding by a thousand, as some untrained
ones and those of spikes do: what the graph in float32 differs from itself in float64 by, a float32
file may as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.signal import sqnr_db

__all__ = ["FLOOR_MARGIN_DB", "half_floor_db", "run_in_half", "single_floor_db"]

FLOOR_MARGIN_DB = 6.0


def run_in_half(graph_module: fx.GraphModule, images: Tensor) -> Tensor:
    """Logits with every float tensor rounded to float16 and each operator computed in float32.

    Args:
        images: (N, 3, S, S) float32.

    Returns:
        (N, classes) float32; not finite where a value is too large for float16.
    """
    return _run(graph_module, images, lambda value: value.half().float())


@torch.no_grad()
def half_floor_db(
    graph_module: fx.GraphModule,
    images: Tensor,
    part: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> float:
    """SQNR of the graph in float16 against itself in float32; ``part`` takes what counts."""
    return sqnr_db(part(graph_module(images)), part(run_in_half(graph_module, images)))


@torch.no_grad()
def single_floor_db(
    graph_module: fx.GraphModule,
    images: Tensor,
    part: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> float:
    """SQNR of the graph in float32 against itself in float64; ``part`` takes what counts."""
    exact = _run(graph_module, images.double(), lambda value: value.double())
    return sqnr_db(part(exact), part(graph_module(images)))


def _run(graph_module: fx.GraphModule, images: Tensor, to: Callable[[Tensor], Tensor]) -> Tensor:
    result = _In(graph_module, to).run(images)
    assert isinstance(result, Tensor)
    return result


class _In(fx.Interpreter):
    """Runs a graph with ``to`` applied to every float tensor, constants and results."""

    def __init__(self, graph_module: fx.GraphModule, to: Callable[[Tensor], Tensor]) -> None:
        super().__init__(graph_module)
        self.to = to

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = constant(self.module, n)  # type: ignore[arg-type]
            return super().run_node(n) if value is None else self._changed(value)
        return self._changed(super().run_node(n))

    def _changed(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.to(value) if value.is_floating_point() else value
        if isinstance(value, list | tuple):
            return type(value)(self._changed(item) for item in value)
        return value
