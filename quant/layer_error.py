"""How much each layer loses by itself: its SQNR with the float model's input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.signal import sqnr_db
from deploykit.quant.state import QuantState

__all__ = ["layer_sqnr"]


class _LayerErrors(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, state: QuantState) -> None:
        super().__init__(module)
        self.state = state
        self.found: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        plan = self.state.plans.get(n.name)
        if plan is not None and not plan.is_float:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.found[n.name] = sqnr_db(result, self.state.layer(n, args))
        return result


@torch.no_grad()
def layer_sqnr(graph_module: fx.GraphModule, state: QuantState, batch: Tensor) -> dict[str, float]:
    """SQNR in dB of each planned layer's output, quantised alone, on one batch.

    A simulation of single layers: errors don't add up along the network here, so it says where
    error is made, not what it does to the accuracy. A layer whose weights were fitted to what
    the layers before it get wrong can look worse here than it is.
    """
    runner = _LayerErrors(graph_module, state)
    runner.run(batch)
    return runner.found
