"""How far a graph moves when all its floats are float16: the measure for float16 files.

Such a file can't be as near to the float32 model as a float32 file. Each weight and each
intermediate value is rounded to 11 bits, an error about 73 dB below the value, and what comes of
that at the logits depends on the model: tens of decibels lie between a well-trained transformer and
a network whose sums cancel. So the tolerance is measured and not fixed: the same rounding is done
in torch, and a file may have at most twice that noise's amplitude (6 dB), because it fuses and
orders the operators differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.signal import sqnr_db

__all__ = ["HALF_MARGIN_DB", "half_floor_db", "run_in_half"]

HALF_MARGIN_DB = 6.0


def run_in_half(graph_module: fx.GraphModule, images: Tensor) -> Tensor:
    """Logits with every float tensor rounded to float16 and each operator computed in float32.

    Args:
        images: (N, 3, S, S) float32.

    Returns:
        (N, classes) float32; not finite where a value is too large for float16.
    """
    result = _Half(graph_module).run(images)
    assert isinstance(result, Tensor)
    return result


@torch.no_grad()
def half_floor_db(
    graph_module: fx.GraphModule,
    images: Tensor,
    part: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> float:
    """SQNR of the graph in float16 against itself in float32; ``part`` takes what counts."""
    return sqnr_db(part(graph_module(images)), part(run_in_half(graph_module, images)))


class _Half(fx.Interpreter):
    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = constant(self.module, n)  # type: ignore[arg-type]
            return super().run_node(n) if value is None else _rounded(value)
        return _rounded(super().run_node(n))


def _rounded(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.half().float() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_rounded(item) for item in value)
    return value
