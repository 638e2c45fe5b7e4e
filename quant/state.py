"""What has been decided about every layer so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.execute import Hook, call
from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.insert import activation_of
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.weights import QuantizedWeight, quantize_weight

__all__ = ["QuantState", "with_output"]


@dataclass
class QuantState:
    """Decisions about a graph whose operators are still the float ones.

    Attributes:
        plans: by node name.
        activations: quantiser of each (source node, bits) a layer reads.
        outputs: quantiser of each convolution whose output is quantised too.
        weights: codes by layer node name; a layer without any runs with its float weight.
        biases: float32 (out,), by layer node name, in place of the graph's.
        targets: the weight (of the layer's shape) that codes round, where a correction changed it.
    """

    plans: dict[str, LayerPlan]
    activations: dict[tuple[str, int], FittedQuantizer]
    outputs: dict[str, FittedQuantizer]
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)

    def input_quantizer(self, node: fx.Node) -> FittedQuantizer | None:
        """The quantiser of a planned node's first argument, None where it stays in float."""
        keys = self.input_keys(node)
        return self.activations[keys[0]] if keys else None

    def input_scale(self, node: fx.Node) -> float | None:
        """The scale of a planned node's uniformly quantised first argument."""
        quantizer = self.input_quantizer(node)
        return quantizer.scale if isinstance(quantizer, UniformQuantizer) else None

    def round_to_nearest(
        self, graph_module: fx.GraphModule, method: Literal["minmax", "mse"]
    ) -> None:
        """Give every planned weight its nearest codes."""
        for node in graph_module.graph.nodes:
            plan = self.plans.get(node.name)
            if plan is None or plan.weight_bits in (None, FLOAT):
                continue
            weight = constant(graph_module, node.args[1])
            assert weight is not None and plan.weight_bits is not None
            self.weights[node.name] = quantize_weight(
                weight,
                plan.weight_bits,
                method,
                bias=constant(graph_module, node.args[2]) if len(node.args) > 2 else None,
                input_scale=self.input_scale(node),
            )

    def input_keys(self, node: fx.Node) -> list[tuple[str, int]]:
        """The (source node, bits) pairs a planned node reads, none where it reads floats."""
        plan = self.plans[node.name]
        if plan.input_bits == FLOAT:
            return []
        sources = [source for source in node.args[: plan.inputs] if isinstance(source, fx.Node)]
        return [(source.name, plan.input_bits) for source in sources]

    def quantized_inputs(self, node: fx.Node, args: Sequence[Any]) -> list[Any]:
        """A planned node's arguments with its activations quantised."""
        result = list(args)
        for position, key in enumerate(self.input_keys(node)):
            result[position] = self.activations[key](result[position])
        return result

    def hooks(self, graph: fx.Graph) -> dict[str, Hook]:
        """Everything decided, as it will run: for ``Executor.run``."""
        hooks: dict[str, Hook] = dict.fromkeys(self.plans, self.layer)
        nodes = {node.name: node for node in graph.nodes}
        for name, quantizer in self.outputs.items():
            last = activation_of(nodes[name])
            hooks[last.name] = with_output(hooks.get(last.name), quantizer)
        return hooks

    def layer(self, node: fx.Node, args: Sequence[Any]) -> Any:
        """A planned node's value from its evaluated float arguments, as decided so far."""
        result = self.quantized_inputs(node, args)
        if node.name in self.weights:
            result[1] = self.weights[node.name].dequantize()
        if node.name in self.biases:
            result[2:3] = [self.biases[node.name]]
        return call(node, result)


def with_output(inner: Hook | None, quantizer: Callable[[Tensor], Tensor]) -> Hook:
    """A node's value, as ``inner`` or its own operator gives it, quantised."""

    def hook(node: fx.Node, args: Sequence[Any]) -> Any:
        return quantizer(inner(node, args) if inner else call(node, args))

    return hook
