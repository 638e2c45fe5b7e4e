"""Writing the operators of a merge into a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from deploykit.graph.edit import KEPT_FLOAT, add_tensor
from deploykit.prune.tokens_shapes import ShapeRunner

__all__ = ["END", "Emitter"]

aten = torch.ops.aten
END = 2**63 - 1


class Emitter:
    """Adds nodes before a place in the graph, and knows the shape of each.

    The nodes are named after the block, with the mark that keeps their products in float.
    """

    def __init__(
        self,
        runner: ShapeRunner,
        values: dict[fx.Node, Any],
        example: Tensor,
        before: fx.Node,
        name: str,
    ) -> None:
        self.graph_module = runner.graph_module
        self.graph = runner.graph_module.graph
        self.values = values
        self.before = before
        self._runner, self._example = runner, example
        path = f"{name}.{KEPT_FLOAT}"
        self._stack: Mapping[str, Any] = {path: (path, nn.Module)}

    def __call__(self, target: Callable[..., object], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an operator."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["nn_module_stack"] = dict(self._stack)
        self.values[node] = self._runner.run(node, self.values, self._example)
        return node

    def shape(self, node: fx.Node) -> torch.Size:
        shape = self.values[node].shape
        assert isinstance(shape, torch.Size)
        return shape

    def positions(self, count: int) -> fx.Node:
        """A constant int64 (count,): 0 .. count - 1, the same node each time."""
        name = f"token_positions_{count}"
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                found: fx.Node = node
                return found
        first = next(iter(self.graph.nodes))
        node = add_tensor(self.graph_module, name, torch.arange(count), first)
        node.meta = {}
        self.values[node] = self._runner.run(node, self.values, self._example)
        return node

    def slice(self, x: fx.Node, axis: int, start: int, end: int = END, step: int = 1) -> fx.Node:
        return self(aten.slice.Tensor, x, axis, start, end, step)

    def item(self, x: fx.Node, index: int) -> fx.Node:
        return self(operator.getitem, x, index)
