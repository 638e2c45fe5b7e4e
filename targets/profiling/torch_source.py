"""A saved graph's operators as the source of profiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.targets.profiling.ownership import SourceGraph, SourceNode
from deploykit.targets.profiling.torch_events import kind_of
from deploykit.targets.torch_graph import layer_names

__all__ = ["graph_source", "operator_of"]


def operator_of(node: Any) -> str:
    """``aten::linear`` of a node that calls it; empty where tensors aren't what it computes."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    name = "" if schema is None else str(schema.name)
    return "" if name.startswith("aten::sym_") else name


def graph_source(graph_module: Any) -> SourceGraph:
    """The nodes under their own names; a computing one's layer as plans and recipes call it.

    Args:
        graph_module: a saved graph (``torch.fx.GraphModule``).
    """
    layers: Mapping[str, str] = layer_names(graph_module)
    nodes = []
    for node in graph_module.graph.nodes:
        operator = operator_of(node)
        layer = layers.get(node.name, node.name) if kind_of(operator) == "compute" else ""
        nodes.append(SourceNode(node.name, layer, tuple(i.name for i in node.all_input_nodes)))
    return SourceGraph(nodes)
