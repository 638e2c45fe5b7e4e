"""Cutting a captured graph into units: runs of operators joined by a single tensor.

A unit is what block reconstruction works on. It is found from the graph alone: wherever exactly
one activation is alive, the graph can be cut (every residual network has such places between its
blocks), and neighbouring pieces of one numbered module (``blocks.3``) are joined again.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from deploykit.graph.edit import is_op, layer_name
from deploykit.graph.levels import level_nodes

__all__ = ["Unit", "activation_nodes", "image_nodes", "split_units"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Unit:
    """Consecutive operators with one input tensor and one output tensor.

    Attributes:
        name: dotted name of the module its layers share.
        nodes: in order; the last one is the output.
        source: the node whose value is the input.
        layers: names of its planned nodes, in order.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    layers: tuple[str, ...]

    @property
    def output(self) -> fx.Node:
        return self.nodes[-1]


def image_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value depends on the image itself, not only on its size."""
    found = {node for node in graph.nodes if node.op == "placeholder"}
    for node in graph.nodes:
        if is_op(node, aten.sym_size.int):
            continue
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def activation_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The operators among ``image_nodes``, in order."""
    found = image_nodes(graph)
    return [node for node in graph.nodes if node.op == "call_function" and node in found]


def split_units(graph: fx.Graph, planned: Container[str]) -> list[Unit]:
    """The graph as a chain of units, each holding at least one planned layer.

    Args:
        planned: names of the nodes that are quantised.
    """
    (image,) = [node for node in graph.nodes if node.op == "placeholder"]
    pieces = _pieces(image, _chain(graph, planned))
    groups: list[list[fx.Node]] = []
    names: list[str | None] = []
    for piece in pieces:
        name = _block_name([node for node in piece if node.name in planned])
        joins = groups and (name is None or names[-1] is None or name == names[-1])
        if joins:
            groups[-1] += piece
            names[-1] = names[-1] or name
        else:
            groups.append(list(piece))
            names.append(name)
    units, source = [], image
    for nodes, name in zip(groups, names, strict=True):
        layers = tuple(node.name for node in nodes if node.name in planned)
        units.append(Unit(name or nodes[-1].name, tuple(nodes), source, layers))
        source = nodes[-1]
    return units


def _chain(graph: fx.Graph, planned: Container[str]) -> list[fx.Node]:
    """The activations that lead to a planned layer or to the last output.

    Of feature maps only the last counts: the others are left behind on the way, and would keep
    everything after the first of them in one piece if they counted as alive.
    """
    nodes, levels = activation_nodes(graph), level_nodes(graph)
    if not levels:
        return nodes
    wanted = {levels[-1], *(node for node in nodes if node.name in planned)}
    for node in reversed(nodes):
        if node in wanted:
            wanted.update(node.all_input_nodes)
    return [node for node in nodes if node in wanted]


def _pieces(image: fx.Node, nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Cut after every operator that leaves one tensor alive, itself."""
    inside = set(nodes)
    waiting = {node: sum(user in inside for user in node.users) for node in [image, *nodes]}
    alive = {image}
    pieces: list[list[fx.Node]] = [[]]
    for node in nodes:
        pieces[-1].append(node)
        for source in node.all_input_nodes:
            if source in waiting:
                waiting[source] -= 1
                if waiting[source] == 0:
                    alive.discard(source)
        alive.add(node)
        if alive == {node} and not _gives_a_tuple(node):
            pieces.append([])
    return [piece for piece in pieces if piece]


def _gives_a_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def _block_name(layers: Sequence[fx.Node]) -> str | None:
    """The longest module path that ends in a number and holds all the layers."""
    if not layers:
        return None
    paths = [layer_name(node).split(".") for node in layers]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    numbered = [i for i, part in enumerate(common) if part.isdigit()]
    if len(paths) == 1 and numbered and numbered[-1] == len(common) - 1:
        numbered.pop()  # a lone layer that is itself an entry of a list: look for its block
    return ".".join(common[: numbered[-1] + 1]) if numbered else ".".join(common) or None
