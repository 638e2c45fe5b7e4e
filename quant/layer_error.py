"""How much each layer loses by itself: its SQNR with the float model's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.weights import QuantizedWeight

__all__ = ["layer_sqnr"]


class _LayerErrors(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        plans: Mapping[str, LayerPlan],
        activations: Mapping[tuple[str, int], FittedQuantizer],
        weights: Mapping[str, QuantizedWeight],
    ) -> None:
        super().__init__(module)
        self.plans, self.activations, self.weights = plans, activations, weights
        self.found: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        plan = self.plans.get(n.name)
        if plan is not None and not plan.is_float:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            quantized = list(args)
            if plan.input_bits != FLOAT:
                for position in range(plan.inputs):
                    source = n.args[position]
                    assert isinstance(source, fx.Node)
                    quantizer = self.activations[source.name, plan.input_bits]
                    quantized[position] = quantizer(args[position])
            if n.name in self.weights:
                quantized[1] = self.weights[n.name].dequantize()
            assert callable(n.target)
            self.found[n.name] = sqnr_db(result, n.target(*quantized, **kwargs))
        return result


@torch.no_grad()
def layer_sqnr(
    graph_module: fx.GraphModule,
    plans: Mapping[str, LayerPlan],
    activations: Mapping[tuple[str, int], FittedQuantizer],
    weights: Mapping[str, QuantizedWeight],
    batch: Tensor,
) -> dict[str, float]:
    """SQNR in dB of each planned layer's output, quantised alone, on one batch.

    A simulation of single layers: errors don't add up along the network here, so it says where
    error is made, not what it does to the accuracy.
    """
    runner = _LayerErrors(graph_module, plans, activations, weights)
    runner.run(batch)
    return runner.found
