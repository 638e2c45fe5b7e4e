"""Running parts of a captured graph, with some operators replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.units import Unit, activation_nodes

__all__ = ["Executor", "Hook", "Run", "call", "take"]

Hook = Callable[[fx.Node, Sequence[Any]], Any]
"""Gives a node's value from its evaluated arguments, in place of its own operator."""


def call(node: fx.Node, args: Sequence[Any]) -> Any:
    """The node's own operator on other arguments."""
    assert callable(node.target)
    return node.target(*args, **node.kwargs)


def take(batches: Iterable[Tensor], count: int) -> list[Tensor]:
    """The first ``count`` images, in batches."""
    taken: list[Tensor] = []
    left = count
    for batch in batches:
        taken.append(batch[:left])
        left -= len(batch)
        if left <= 0:  # the next batch isn't even made
            break
    return taken


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
