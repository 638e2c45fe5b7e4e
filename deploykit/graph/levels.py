"""Feature maps at several resolutions, carried through the house as one tensor.

A backbone for detection or segmentation gives maps, ``levels``, and no scores. Everything between
capture and export works on graphs with one output: so the maps are flattened and joined there,
image by image, by one operator at the very end. An exporter takes that operator off again
(``apart``), and a file has its maps as outputs of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.edit import is_op
from deploykit.types import FeatureLevel

__all__ = ["apart", "has_levels", "is_join", "join_levels", "level_nodes", "split_joined"]


@torch.library.custom_op("deploykit::join_levels", mutates_args=())
def join_levels(levels: Sequence[Tensor]) -> Tensor:
    """Feature maps (N, C, H, W), of any sizes, as one tensor (N, sum of C*H*W), in order."""
    return torch.cat([level.flatten(1) for level in levels], 1)


@join_levels.register_fake
def _(levels: Sequence[Tensor]) -> Tensor:
    return torch.cat([level.flatten(1) for level in levels], 1)


def _remember_shapes(ctx: Any, inputs: tuple[Sequence[Tensor]], output: Tensor) -> None:  # noqa: ARG001
    ctx.shapes = [level.shape for level in inputs[0]]


def _gradient(ctx: Any, gradient: Tensor) -> list[Tensor]:
    parts = gradient.split([shape[1:].numel() for shape in ctx.shapes], 1)
    return [part.reshape(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]


join_levels.register_autograd(_gradient, setup_context=_remember_shapes)


def is_join(node: object) -> bool:
    """Whether a node joins levels."""
    return is_op(node, torch.ops.deploykit.join_levels.default)


def level_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose values are a graph's feature maps; none of a graph that gives scores."""
    joins = [node for node in graph.nodes if is_join(node)]
    return [level for node in joins for level in node.args[0]]


def has_levels(graph: fx.Graph) -> bool:
    """Whether a graph gives feature maps."""
    return any(is_join(node) for node in graph.nodes)


def apart(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same tensors, its feature maps a tuple; itself without levels."""
    if not has_levels(graph_module.graph):
        return graph_module
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node.op != "output" and not is_join(node):
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[level] for level in level_nodes(graph_module.graph)))
    return fx.GraphModule(graph_module, graph)


def split_joined(joined: Tensor, levels: Sequence[FeatureLevel]) -> list[Tensor]:
    """Each level's part of a joined tensor (N, total), as (N, C*H*W); the whole without levels."""
    return list(joined.split([level.values for level in levels], 1)) if levels else [joined]
