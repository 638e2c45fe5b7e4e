"""The shape of every value of a graph, without computing any."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["ShapeRunner"]


class ShapeRunner:
    """Runs nodes on tensors that have a shape and a type but no elements."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, node: fx.Node, values: Mapping[fx.Node, Any], example: Tensor) -> Any:
        """The value of one node from those of the nodes it reads.

        Raises:
            Exception: whatever the operator raises where its arguments don't fit.
        """
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.graph_module)
            return self.mode.from_tensor(value.detach())
        with self.mode, torch.no_grad():
            if node.op == "placeholder":
                return torch.empty(example.shape, dtype=example.dtype)
            args = fx.map_arg(node.args, values.__getitem__)
            if node.op == "output":
                return args[0]
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def all(self, example: Tensor) -> dict[fx.Node, Any]:
        """The value of every node for an input of the shape of ``example``."""
        values: dict[fx.Node, Any] = {}
        for node in self.graph_module.graph.nodes:
            values[node] = self.run(node, values, example)
        return values
