"""Which layers are quantised, at which widths, and which stay in float and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch

import torch
from torch import fx

from deploykit.errors import UsageError
from deploykit.graph.edit import constant, is_kept_float, is_op, layer_name
from deploykit.graph.layer_names import (
    LAYER_OPS,
    MOVES,
    PRODUCT_OPS,
    is_softmax_output,
    product_name,
)
from deploykit.graph.quantized import FLOAT, LayerPlan

__all__ = ["is_gelu_output", "is_softmax_output", "plan_layers"]

aten = torch.ops.aten


def plan_layers(
    graph_module: fx.GraphModule,
    weight_bits: int,
    input_bits: int,
    *,
    edge_bits: int = 8,
    keep_8bit: Sequence[str] = (),
    float_layers: Sequence[str] = (),
    layer_bits: Sequence[tuple[str, str]] = (),
) -> list[LayerPlan]:
    """Plan every convolution, linear layer and attention matmul of a graph.

    Args:
        edge_bits: width of the first layer's input (the image), and of everything in
            ``keep_8bit`` when the asked widths are narrower.
        keep_8bit: ``first``, ``last`` and/or ``depthwise``.
        float_layers: globs of layer names left in float.
        layer_bits: (glob of layer names, ``wNaM`` or ``float``) in place of the asked widths;
            the first match counts, and ``keep_8bit`` doesn't.

    Raises:
        UsageError: a glob matches no layer.
    """
    unmatched = {glob for glob, _ in layer_bits} | set(float_layers)
    first, last = _first_layers(graph_module), _last_layers(graph_module)
    plans = []
    for node in graph_module.graph.nodes:
        name = layer_name(node)
        if is_op(node, *LAYER_OPS) and constant(graph_module, node.args[1]) is not None:
            op = "linear" if is_op(node, aten.linear.default) else "conv2d"
            weights, inputs, notes = weight_bits, input_bits, []
            kinds = {
                "first": node in first,
                "last": node in last,
                "depthwise": _is_depthwise(graph_module, node),
            }
            for kind in (k for k in keep_8bit if kinds[k]):
                if weights < edge_bits or inputs < edge_bits:
                    notes.append(f"{kind} layer kept at {edge_bits} bits")
                weights, inputs = max(weights, edge_bits), max(inputs, edge_bits)
            if node in first and inputs < edge_bits:
                inputs = edge_bits
                notes.append(f"the image keeps {edge_bits} bits")
            plan = LayerPlan(node.name, name, op, weights, inputs, note="; ".join(notes))
        elif (
            is_op(node, *PRODUCT_OPS)
            and not is_kept_float(node)
            and all(isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in node.args[:2])
        ):
            softmax = any(is_softmax_output(arg) for arg in node.args[:2])
            name = product_name(node)
            plan = LayerPlan(node.name, name, "matmul", None, input_bits, softmax)
        else:
            continue
        rules = [(glob, "float") for glob in float_layers] + list(layer_bits)
        matches = [rule for rule in rules if fnmatch(plan.layer, rule[0])]
        unmatched -= {glob for glob, _ in matches}
        plans.append(_asked(plan, *matches[0]) if matches else plan)
    if unmatched:
        message = (
            f"no layer's name matches {sorted(unmatched)[0]!r}; the names are in a report's "
            "table of layers, such as " + ", ".join(plan.layer for plan in plans[:3])
        )
        raise UsageError(message)
    return plans


def _asked(plan: LayerPlan, glob: str, bits: str) -> LayerPlan:
    """A plan at the widths that ``glob`` was given."""
    if bits == "float":
        weights, inputs, note = FLOAT, FLOAT, f"left in float by {glob!r}"
    else:
        weights, inputs = (int(width) for width in bits[1:].split("a"))
        note = f"{bits} by {glob!r}"
    return replace(
        plan,
        weight_bits=None if plan.weight_bits is None else weights,
        input_bits=inputs,
        note=note,
    )


def is_gelu_output(node: object) -> bool:
    """Whether a node's values are those of a GELU, perhaps moved."""
    while is_op(node, *MOVES):
        assert isinstance(node, fx.Node)
        node = node.args[0]
    return is_op(node, aten.gelu.default)


def _is_depthwise(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    weight = constant(graph_module, node.args[1])
    groups = node.args[6] if len(node.args) > 6 else 1
    return weight is not None and weight.ndim == 4 and groups in set(weight.shape[:1]) - {1}


def _first_layers(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Layers that read the image before any other layer did."""
    return _reach(
        [node for node in graph_module.graph.nodes if node.op == "placeholder"],
        lambda node: list(node.users),
    )


def _last_layers(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Layers that make the logits."""
    return _reach(
        [node for node in graph_module.graph.nodes if node.op == "output"],
        lambda node: list(node.all_input_nodes),
    )


def _reach(start, step) -> set[fx.Node]:  # type: ignore[no-untyped-def]
    found, seen, todo = set(), set(start), list(start)
    while todo:
        for node in step(todo.pop()):
            if node in seen or is_op(node, aten.sym_size.int):  # a size is no layer's input
                continue
            seen.add(node)
            if is_op(node, *LAYER_OPS, *PRODUCT_OPS):
                found.add(node)
            else:
                todo.append(node)
    return found
