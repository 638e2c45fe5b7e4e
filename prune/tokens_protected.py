"""Which tokens aren't patches: class, distillation and register tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.prune.tokens_errors import BlockedError

__all__ = ["leading_tokens"]


@torch.no_grad()
def leading_tokens(
    graph_module: fx.GraphModule, stream: fx.Node, values: Mapping[fx.Node, Any], example: Tensor
) -> int:
    """How many tokens in front of a stream are the same for every image before any attention.

    Two random images are taken as far as the first value of the stream's shape: found so, and
    not from a concatenation, it holds for every way of writing a model.

    Args:
        stream: (B, N, C).

    Raises:
        BlockedError: such tokens stand behind others.
    """
    first = _earliest(graph_module.graph, stream, values)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, *example.shape[1:], generator=generator) for _ in range(2)]
    one, other = (_value(graph_module, first, image) for image in images)
    same = (one == other).all(-1)[0]
    count = int(same.sum())
    if not bool(same[:count].all()):
        raise BlockedError("tokens that are the same for every image don't stand in front")
    return count


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _earliest(graph: fx.Graph, stream: fx.Node, values: Mapping[fx.Node, Any]) -> fx.Node:
    """The first value of the stream's shape that the stream is made of."""
    shape, before = values[stream].shape, _ancestors(stream)
    for node in graph.nodes:
        value = values[node]
        if node in before and isinstance(value, Tensor) and value.shape == shape:
            found: fx.Node = node
            return found
    return stream


def _value(graph_module: fx.GraphModule, wanted: fx.Node, image: Tensor) -> Tensor:
    """A node's value, with nothing computed that it doesn't need."""
    needed = _ancestors(wanted)
    runner = fx.Interpreter(graph_module)
    runner.args_iter = iter([image])
    for node in graph_module.graph.nodes:
        if node in needed:
            runner.env[node] = runner.run_node(node)
    result = runner.env[wanted]
    assert isinstance(result, Tensor)
    return result
