"""What has been decided about every layer so far, and running the graph with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.insert import activation_of
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.units import Unit, activation_nodes
from deploykit.quant.weights import QuantizedWeight, quantize_weight

__all__ = ["Executor", "Hook", "QuantState", "Run", "call", "with_output"]


Hook = Callable[[fx.Node, Sequence[Any]], Any]
"""Gives a node's value from its evaluated arguments, in place of its own operator."""


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


def call(node: fx.Node, args: Sequence[Any]) -> Any:
    """The node's own operator on other arguments."""
    assert callable(node.target)
    return node.target(*args, **node.kwargs)


class Executor:
    """Runs part of a graph, with some operators replaced.

    Values that depend on the batch's size alone (position tables, sizes) are worked out once a
    size and kept.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.activations = activation_nodes(graph_module.graph)
        self._free: dict[int, dict[fx.Node, Any]] = {}
        self.image_shape: tuple[int, ...] = ()
        (self.image,) = [n for n in graph_module.graph.nodes if n.op == "placeholder"]

    @torch.no_grad()
    def prepare(self, image: Tensor) -> None:
        """Work out the size-only values for the batch size of ``image`` (N, 3, S, S)."""
        if len(image) in self._free:
            return
        self.image_shape = tuple(image.shape[1:])
        recorder = _FreeValues(self.graph_module, set(self.activations))
        recorder.run(torch.zeros_like(image))
        self._free[len(image)] = recorder.found

    def run(
        self,
        nodes: Sequence[fx.Node],
        source: fx.Node,
        value: Tensor,
        batch: int,
        hooks: Mapping[str, Hook] | None = None,
    ) -> Any:
        """The value of the last of ``nodes`` when ``source`` has ``value``.

        Args:
            batch: number of images; ``prepare`` was called for it.
        """
        return Run(self, nodes, source, value, batch).finish(hooks or {})

    @torch.no_grad()
    def outputs(
        self,
        unit: Unit,
        inputs: Sequence[Tensor],
        counts: Sequence[int],
        hooks: Mapping[str, Hook] | None = None,
    ) -> list[Tensor]:
        """A unit's output for each of its inputs, which are batches of ``counts`` images."""
        return [
            self.run(unit.nodes, unit.source, x, count, hooks)
            for x, count in zip(inputs, counts, strict=True)
        ]

    def constant(self, node: fx.Node, batch: int) -> Any:
        """The value of a node that doesn't depend on the images."""
        value = constant(self.graph_module, node)
        return self._free[batch][node] if value is None else value


class Run:
    """Part of a graph on one batch: stops before an operator, and goes on from there."""

    def __init__(
        self,
        executor: Executor,
        nodes: Sequence[fx.Node],
        source: fx.Node,
        value: Tensor,
        batch: int,
    ) -> None:
        self._executor, self._nodes, self._batch = executor, nodes, batch
        self._start = {source: value}
        self._last_use = {used: node for node in nodes for used in node.all_input_nodes}
        self.rewind()

    def rewind(self) -> None:
        """Forget everything but the input."""
        self._values: dict[fx.Node, Any] = dict(self._start)
        self._position = 0

    @property
    def live_bytes(self) -> int:
        """Memory of the values that are kept, without the input's."""
        tensors = [v for n, v in self._values.items() if n not in self._start]
        return sum(t.nbytes for t in tensors if isinstance(t, Tensor))

    def before(self, stop: fx.Node, hooks: Mapping[str, Hook]) -> list[Any]:
        """Run everything before ``stop``; its evaluated arguments."""
        while self._nodes[self._position] is not stop:
            self.step(hooks)
        return list(self._arguments(stop))

    def step(self, hooks: Mapping[str, Hook]) -> Any:
        """Run the next operator; its value."""
        node = self._nodes[self._position]
        args = self._arguments(node)
        hook = hooks.get(node.name)
        result = hook(node, args) if hook else call(node, args)
        self._values[node] = result
        self._position += 1
        for used in node.all_input_nodes:
            if self._last_use[used] is node:
                self._values.pop(used, None)
        return result

    def finish(self, hooks: Mapping[str, Hook]) -> Any:
        """Run what is left; the last operator's value."""
        while self._position < len(self._nodes):
            self.step(hooks)
        return self._values[self._nodes[-1]]

    def _arguments(self, node: fx.Node) -> Any:
        def value(n: fx.Node) -> Any:
            return self._values[n] if n in self._values else self._executor.constant(n, self._batch)

        return fx.map_arg(node.args, value)


class _FreeValues(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, activations: set[fx.Node]) -> None:
        super().__init__(module)
        self.activations = activations
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and n not in self.activations:
            self.found[n] = result
        return result
