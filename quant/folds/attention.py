"""Find attention in any captured graph, and which weights make each head's channels.

Nothing is matched by name. A softmax is attention where one product of two activations makes its
input and one reads its output; the operands of both are traced back to the layers that make them
(``trace.py``), so joint and separate q, k, v, window partitions, 1x1 convolutions and
rotary embeddings all look alike here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from deploykit.graph.edit import is_op
from deploykit.quant.folds.layers import channel_axis, op_name, takes_shift
from deploykit.quant.folds.operands import Found, Operand, OperandFinder, make_operand
from deploykit.quant.folds.trace import BlockedError, Trace, keeps_shift, readers, table

__all__ = ["AttentionGroup", "Operand", "find_attention"]

aten = torch.ops.aten

_MATMULS = (aten.matmul.default, aten.bmm.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_ADDED = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor)
_SCALED = (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor)


@dataclass(frozen=True)
class AttentionGroup:
    """One attention: ``softmax(query key^T ...) value``, and the projection after it.

    Attributes:
        query, key, value: the operands; each has its own reason if it can't be folded.
        logits: the product of query and key.
        softmax: the softmax.
        context: the product with the value.
        heads: H, 1 where there is no head axis.
        head_axis: of the operands, from the end (-3 nearly always), or None.
        value_axis: the value's channel axis, -1 or -2 (where the value is the left operand).
        projection: the layer that reads the context, if one does.
        columns: int64 (I,), ``head * D + dimension`` of the context at each of the projection's
            input channels, -1 where it reads something else.
    """

    query: Operand
    key: Operand
    value: Operand
    logits: fx.Node
    softmax: fx.Node
    context: fx.Node
    heads: int
    head_axis: int | None
    value_axis: int
    projection: fx.Node | None
    columns: Tensor

    @property
    def declined(self) -> str | None:
        """Why nothing of it can be folded, or None if an operand can."""
        reasons = [part.declined for part in (self.query, self.key, self.value)]
        return None if None in reasons else "; ".join(dict.fromkeys(str(r) for r in reasons))


def find_attention(graph_module: fx.GraphModule) -> list[AttentionGroup]:
    """Every attention of a graph, in order, each operand foldable or with the reason why not.

    BatchNorms should have been folded before: one between a layer and the product declines the
    operand.
    """
    trace = Trace(graph_module)
    groups = []
    for node in graph_module.graph.nodes:
        if not is_op(node, *_SOFTMAX):
            continue
        logits, context = _product_before(trace, node), _product_after(trace, node)
        if logits is not None and context is not None:
            groups.append(_group(trace, logits, node, context))
    return groups


def _is_product(trace: Trace, node: fx.Node) -> bool:
    return is_op(node, *_MATMULS) and all(arg in trace.data for arg in node.args[:2])


def _same_size(trace: Trace, node: fx.Node, other: fx.Node) -> bool:
    shape = trace.shapes[node]
    return isinstance(shape, torch.Size) and shape.numel() == trace.shape(other).numel()


def _product_before(trace: Trace, softmax: fx.Node) -> fx.Node | None:
    """The one product whose elements become the softmax's, whatever is done to each of them."""
    return _only_product(trace, softmax, lambda node: node.all_input_nodes)


def _product_after(trace: Trace, softmax: fx.Node) -> fx.Node | None:
    return _only_product(trace, softmax, readers, after=True)


def _only_product(
    trace: Trace, softmax: fx.Node, step: Callable[[fx.Node], list[fx.Node]], after: bool = False
) -> fx.Node | None:
    found, seen, todo = [], {softmax}, [softmax]
    while todo:
        for node in step(todo.pop()):
            if node in seen or node not in trace.data:
                continue
            seen.add(node)
            if _is_product(trace, node) and (after or _same_size(trace, node, softmax)):
                found.append(node)
            elif not is_op(node, *_MATMULS) and (
                _same_size(trace, node, softmax) or (after and keeps_shift(node))
            ):
                todo.append(node)
    return found[0] if len(found) == 1 else None


def _group(trace: Trace, logits: fx.Node, softmax: fx.Node, context: fx.Node) -> AttentionGroup:
    left, right = context.args[0], context.args[1]
    value_is_left = not _made_by(left, softmax)
    value_axis = -2 if value_is_left else -1
    finder = OperandFinder(trace)
    q, k = logits.args[0], logits.args[1]
    v = left if value_is_left else right
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    found = {"query": finder.trace(q, -1), "key": finder.trace(k, -2)}
    found["value"] = finder.trace(v, value_axis)
    axes = {axis for part in found.values() if isinstance(part, Found) for axis in part.varying}
    head_axis = max(axes, default=None)
    if len(axes) > 1:
        found = dict.fromkeys(found, "its heads lie along more than one axis")
    for name, part in found.items():
        if isinstance(part, Found) and part.varying and -part.varying[0] == part.ndim:
            found[name] = "its heads are merged with the batch"
    heads = 1 if head_axis is None else max(_size(trace, n, head_axis) for n in (q, k, v))
    sinks = {(logits, q), (logits, k), (context, v)}
    operands = {
        name: make_operand(finder, node, found, name, head_axis, heads, sinks)
        for name, node in (("query", q), ("key", k), ("value", v))
    }
    key = operands["key"]
    if key.declined is None and key.shift_declined is None:
        operands["key"] = replace(key, shift_declined=_sees_a_shift(trace, logits, softmax))
    projection, columns, shift_reason = None, torch.zeros(0, dtype=torch.int64), None
    if operands["value"].declined is None:
        try:
            projection, columns, shift_reason = _projection(
                trace, context, head_axis, heads, value_axis
            )
        except BlockedError as blocked:
            operands["value"] = Operand(v, declined=f"after it, {blocked}")
    if operands["value"].declined is None:
        shift_reason = shift_reason or _rows_sum_to_one(trace, softmax, context, value_is_left)
        old = operands["value"]
        operands["value"] = replace(old, shift_declined=old.shift_declined or shift_reason)
    return AttentionGroup(
        operands["query"], operands["key"], operands["value"], logits, softmax, context,
        heads, head_axis, value_axis, projection, columns,
    )  # fmt: skip


def _size(trace: Trace, node: fx.Node, axis: int) -> int:
    shape = trace.shape(node)
    return shape[axis] if -axis <= len(shape) else 1


def _made_by(node: object, source: fx.Node) -> bool:
    """Whether ``source`` is among what ``node`` was made from, by the nodes of attention."""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is source:
            return True
        if isinstance(node, fx.Node) and node not in seen and not is_op(node, *_MATMULS):
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _projection(
    trace: Trace, context: fx.Node, head_axis: int | None, heads: int, value_axis: int
) -> tuple[fx.Node, Tensor, str | None]:
    """The layer that reads the context, its columns, and why a shift can't reach its bias."""
    shape = trace.shape(context)
    dimension = torch.arange(shape[value_axis], dtype=torch.int32)
    labels = dimension if value_axis == -1 else dimension[:, None]
    if head_axis is not None:
        head = torch.arange(heads, dtype=torch.int32).reshape(-1, *[1] * (-head_axis - 1))
        labels = labels + head * shape[value_axis]
    found = list(trace.layers_after(context, labels.expand(shape)))
    if len(found) != 1:
        raise BlockedError("more than one layer reads the result")
    layer, at_input, path = found[0]
    columns = table(at_input, [channel_axis(layer)]).long()
    reason = None
    if not all(keeps_shift(node) for node in path):
        reason = "a nonlinear operator or a product lies before the projection"
    elif not takes_shift(layer):
        reason = "the projection pads zeros, which a shift can't pass"
    return layer, columns, reason


def _rows_sum_to_one(
    trace: Trace, softmax: fx.Node, context: fx.Node, value_is_left: bool
) -> str | None:
    """Why the weights that multiply the value may not sum to 1, or None if they do."""
    shape = trace.shape(softmax)
    axis = softmax.args[1]
    assert isinstance(axis, int)
    labels = torch.arange(shape[axis], dtype=torch.int32)
    labels = labels.reshape(-1, *[1] * (len(shape) - 1 - axis % len(shape))).expand(shape)
    node, known = softmax, [labels]
    try:
        while context not in readers(node):
            (after,) = readers(node)
            if not keeps_shift(after):
                raise BlockedError(f"{op_name(after)} stands between")
            node, known = after, trace.step(after, {node: known})
        positions = table(known[0], [-2 if value_is_left else -1])
    except (BlockedError, ValueError):
        return "the attention weights are changed after the softmax"
    if not torch.equal(positions.sort().values, torch.arange(shape[axis], dtype=torch.int32)):
        return "the softmax is not taken over the tokens that are summed"
    return None


def _sees_a_shift(trace: Trace, logits: fx.Node, softmax: fx.Node) -> str | None:
    """Why the softmax may see a number added to all logits of a query, or None if it doesn't."""
    shape = trace.shape(logits)
    labels = [torch.arange(shape[-1], dtype=torch.int32).expand(shape)]
    path, node = [], softmax
    while node is not logits:
        path.append(node)
        before = [part for part in node.all_input_nodes if _made_by(part, logits)]
        if len(before) != 1:
            return "its logits are read in more than one way"
        (node,) = before
    between = path[:0:-1]
    try:
        for node, source in zip(between, [logits, *between], strict=False):
            if is_op(node, *_ADDED):  # a mask or a bias: whatever it is, it is added to both
                if trace.shape(node) != trace.shape(source):
                    raise BlockedError("logits are spread")
            elif is_op(node, *_SCALED):
                other = node.args[1] if node.args[0] is source else node.args[0]
                size = trace.shape(other)[-1:].numel() if isinstance(other, fx.Node) else 1
                if size != 1 or (is_op(node, aten.div.Tensor) and node.args[0] is not source):
                    raise BlockedError("keys are scaled differently")
            elif keeps_shift(node):
                labels = trace.step(node, {source: labels})
            else:
                raise BlockedError(f"{op_name(node)} stands between")
    except BlockedError as blocked:
        return f"between logits and softmax, {blocked}"
    axis = softmax.args[1]
    assert isinstance(axis, int)
    try:
        positions = table(labels[0], [axis]).sort().values
    except BlockedError:
        positions = torch.zeros(0)
    if not torch.equal(positions, torch.arange(shape[-1], dtype=torch.int32)):
        return "the softmax is not taken over the keys"
    return None
