"""Find the attention blocks of a plain ViT in a captured graph: where tokens can be merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.edit import is_op, layer_name
from deploykit.graph.units import image_nodes
from deploykit.prune.tokens_errors import BlockedError

__all__ = ["AttentionBlock", "find_blocks"]

aten = torch.ops.aten

_MATMULS = (aten.matmul.default, aten.bmm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_ADDS = (aten.add.Tensor,)
_TO_PROJECTION = (
    aten.transpose.int, aten.permute.default, aten.reshape.default, aten.flatten.using_ints,
    aten.linear.default, aten.mul.Tensor, aten.layer_norm.default, aten.rms_norm.default,
    aten.add.Tensor, aten.clone.default, aten.squeeze.dim, aten.unsqueeze.default,
)  # fmt: skip


@dataclass(frozen=True)
class AttentionBlock:
    """One ``softmax(q k^T) v`` and the residual sum its projection joins.

    Attributes:
        name: dotted name of the attention's module.
        key: the right operand of ``q k^T``, (B, H, D, N) or (B, D, N).
        softmax: attention weights, (B, H, N, N) or (B, N, N), rows sum to one over the last axis.
        context: their product with the value.
        residual: the sum, (B, N, C); None where no merge can stand there.
        stream: what the projection is added to, (B, N, C).
        reason: why ``residual`` is None.
        tokens: N, the keys.
    """

    name: str
    key: fx.Node
    softmax: fx.Node
    context: fx.Node
    residual: fx.Node | None
    stream: fx.Node | None
    reason: str
    tokens: int


def find_blocks(graph: fx.Graph, values: Mapping[fx.Node, Any]) -> list[AttentionBlock]:
    """Every attention of the graph, in order. ``values`` are the shapes of its nodes."""
    from_image = image_nodes(graph)
    found = []
    for node in graph.nodes:
        if not is_op(node, *_SOFTMAX) or node not in from_image:
            continue
        block = _block(node, values, from_image)
        if block is not None:
            found.append(block)
    return found


def _block(
    softmax: fx.Node, values: Mapping[fx.Node, Any], from_image: set[fx.Node]
) -> AttentionBlock | None:
    shape = values[softmax].shape
    if softmax.args[1] not in (-1, len(shape) - 1):
        return None
    logits = _logits(softmax.args[0], shape, values)
    contexts = [u for u in softmax.users if is_op(u, *_MATMULS) and u.args[0] is softmax]
    if logits is None or len(contexts) != 1 or len(softmax.users) != 1:
        return None
    key, context = logits.args[1], contexts[0]
    assert isinstance(key, fx.Node)
    residual = stream = None
    batch = next(values[n].shape[0] for n in values if n.op == "placeholder")
    reason = ""
    try:
        residual, stream = _residual(context, shape, batch, values, from_image)
    except BlockedError as blocked:
        reason = str(blocked)
    name = layer_name(context)
    return AttentionBlock(name, key, softmax, context, residual, stream, reason, int(shape[-1]))


def _logits(node: object, shape: torch.Size, values: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The product of query and key that a softmax reads, past sums and scales."""
    while isinstance(node, fx.Node) and node in values:
        if not isinstance(values[node], Tensor) or values[node].shape != shape:
            return None
        if is_op(node, *_MATMULS):
            return node
        if not is_op(node, aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.clone.default):
            return None
        left, right = node.args[0], node.args[1] if len(node.args) > 1 else None
        other = _logits(right, shape, values)
        if other is not None:
            return other
        node = left
    return None


def _residual(
    context: fx.Node,
    weights: torch.Size,
    batch: int,
    values: Mapping[fx.Node, Any],
    from_image: set[fx.Node],
) -> tuple[fx.Node, fx.Node]:
    """The sum of an attention's projection and the stream it read, and that stream."""
    if weights[0] != batch:
        raise BlockedError(f"it attends within windows of {weights[-1]} tokens")
    if weights[-1] != weights[-2]:
        raise BlockedError(f"{weights[-2]} queries attend to {weights[-1]} tokens")
    node = context
    while True:
        users = [user for user in node.users if not is_op(user, aten.sym_size.int)]
        if len(users) != 1 or not is_op(users[0], *_TO_PROJECTION):
            raise BlockedError("its result doesn't go straight to a residual sum")
        user = users[0]
        others = [other for other in user.all_input_nodes if other is not node]
        if is_op(user, *_ADDS) and len(others) == 1 and others[0] in from_image:
            shape = values[user].shape
            if values[others[0]].shape != shape or values[node].shape != shape:
                raise BlockedError("the sum behind it isn't one of equal shapes")
            return _checked(user, shape, weights), others[0]
        node = user


def _checked(residual: fx.Node, shape: torch.Size, weights: torch.Size) -> fx.Node:
    if len(shape) != 3 or shape[1] != weights[-1]:
        raise BlockedError(f"the tokens behind it lie on a map of {list(shape[1:])}")
    if len(weights) not in (3, 4):
        raise BlockedError(f"attention weights with {len(weights)} axes")
    return residual
