"""A query or key multiplied by a number: the number goes into the weights that make it."""

from __future__ import annotations

import math
from collections.abc import Container

import torch
from torch import fx

from deploykit.graph.edit import constant, is_op
from deploykit.graph.layer_names import MOVES
from deploykit.quant.folds.attention import AttentionGroup, Operand, find_attention
from deploykit.quant.folds.head_scale import scale_operand
from deploykit.quant.folds.trace import readers

__all__ = ["absorb_scalars"]

aten = torch.ops.aten


def absorb_scalars(graph_module: fx.GraphModule, products: Container[str]) -> int:
    """Take the multiplications of queries and keys by one positive number out, in place.

    ``softmax((c q) k^T) v`` with ``c q`` made by weights that hold ``c``: one operator less in
    every attention, and what the product reads is what a layer wrote.

    Args:
        products: names of the nodes that multiply query and key, where it may be done.

    Returns:
        How many there were.
    """
    count = 0
    for group in find_attention(graph_module):
        if group.logits.name not in products:
            continue
        for operand in (group.query, group.key):
            count += _absorb(graph_module, group, operand)
    if count:
        graph_module.recompile()
    return count


def _absorb(graph_module: fx.GraphModule, group: AttentionGroup, operand: Operand) -> int:
    if operand.declined is not None:
        return 0
    node, reader = operand.node, group.logits
    while is_op(node, *MOVES) and readers(node) == [reader]:
        node, reader = node.args[0], node  # type: ignore[assignment]
    if not is_op(node, aten.mul.Tensor, aten.div.Tensor) or readers(node) != [reader]:
        return 0
    source, number = node.args
    if not isinstance(source, fx.Node) or constant(graph_module, source) is not None:
        source, number = number, source
        if is_op(node, aten.div.Tensor):
            return 0  # a number divided by the query
    factor = _number(graph_module, number)
    if factor is None or not 0 < factor < math.inf or not isinstance(source, fx.Node):
        return 0
    ratio = factor if is_op(node, aten.div.Tensor) else 1 / factor
    shape = operand.channels.shape
    scale_operand(graph_module, operand, torch.full(shape, ratio, dtype=torch.float64))
    node.replace_all_uses_with(source)
    graph_module.graph.erase_node(node)
    return 1


def _number(graph_module: fx.GraphModule, node: object) -> float | None:
    if isinstance(node, int | float):
        return float(node)
    tensor = constant(graph_module, node)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None
