"""Small helpers for reading and editing captured graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

__all__ = [
    "KEPT_FLOAT",
    "add_tensor",
    "clean",
    "constant",
    "functionalize",
    "is_kept_float",
    "is_op",
    "layer_name",
    "makes_choices",
    "remove_dropout",
]

aten = torch.ops.aten

KEPT_FLOAT = "kept_float"
"""Last part of the layer names of nodes that a quantiser must leave alone, such as those that
match tokens: a rounded score picks other tokens."""

_IDENTITY_OPS = (
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.alpha_dropout.default,
    aten.alpha_dropout_.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.contiguous.default,
)


def is_op(node: object, *targets: Callable[..., object]) -> bool:
    """Whether ``node`` is a call of one of the operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def constant(graph_module: fx.GraphModule, node: object) -> Tensor | None:
    """The tensor behind a get_attr node, or None if ``node`` is something else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(graph_module)
    return value.detach() if isinstance(value, Tensor) else None


def add_tensor(graph_module: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Register a new buffer and return a get_attr node for it, placed before ``before``.

    A fresh buffer is always made, so tensors shared between layers are never changed in place.
    """
    stem = name.replace(".", "_")
    unique, count = stem, 1
    while hasattr(graph_module, unique):
        unique, count = f"{stem}_{count}", count + 1
    graph_module.register_buffer(unique, value.contiguous())
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.get_attr(unique)
    node.meta = {"nn_module_stack": before.meta.get("nn_module_stack", {})}
    return node


def layer_name(node: fx.Node) -> str:
    """The dotted name of the module a node came from, or the node's own name."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if path:
            return str(path)
    return node.name


def is_kept_float(node: fx.Node) -> bool:
    """Whether a pass has marked a node's operator to be computed in float."""
    return layer_name(node).rpartition(".")[2] == KEPT_FLOAT


def makes_choices(graph_module: fx.GraphModule) -> bool:
    """Whether the graph picks by size, so that values almost equal can lead to other results."""
    picks = (
        aten.topk.default,
        aten.sort.default,
        aten.argmax.default,
        aten.argsort.default,
        aten.ge.Scalar,  # spikes
    )
    return any(is_op(node, *picks) for node in graph_module.graph.nodes)


def remove_dropout(graph_module: fx.GraphModule) -> None:
    """Remove operators that do nothing at inference.

    ``contiguous`` is one of them, so each ``view``, which may count on it, becomes a ``reshape``.
    """
    for node in list(graph_module.graph.nodes):
        if is_op(node, *_IDENTITY_OPS):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
        elif is_op(node, aten.view.default):
            node.target = aten.reshape.default


def functionalize(graph_module: fx.GraphModule) -> None:
    """Replace operators that write into their input (``relu_``) by those that don't.

    Passes keep activations to compare and to learn from; none may change under them. A write
    that another name for the same memory shows (a slice that is filled) stays as it is.
    """
    order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        packet, _, overload = str(node.target).removeprefix("aten.").partition(".")
        if not node.target._schema.is_mutable or not packet.endswith("_"):
            continue
        pure = getattr(aten, packet[:-1], None)
        if pure is None or overload not in pure.overloads():
            continue
        written = node.args[0]
        before = [user for user in written.users if order[user] < order[node]]
        if written.op != "call_function" or any(map(_is_view, (written, *before))):
            continue
        node.target = getattr(pure, overload)
        for user in list(written.users):
            if order[user] > order[node]:  # it would have seen the new value
                user.replace_input_with(written, node)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value is another name for its input's memory."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in schema.returns)


def clean(graph_module: fx.GraphModule) -> None:
    """Drop dead nodes and the tensors nothing refers to any more, then recompile."""
    graph = graph_module.graph
    graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    names = [name for name, _ in graph_module.named_parameters(remove_duplicate=False)]
    names += [name for name, _ in graph_module.named_buffers(remove_duplicate=False)]
    for name in names:
        if name not in used:
            owner_name, _, leaf = name.rpartition(".")
            delattr(graph_module.get_submodule(owner_name), leaf)
    graph_module.delete_all_unused_submodules()
    graph.lint()
    graph_module.recompile()
