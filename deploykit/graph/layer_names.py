"""Names of a graph's computing layers, the same before and after it is quantised."""

from __future__ import annotations

import torch
from torch import fx

from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import is_op, layer_name

__all__ = [
    "LAYER_OPS",
    "MOVES",
    "PRODUCT_OPS",
    "computing_layers",
    "is_softmax_output",
    "product_name",
]

aten = torch.ops.aten

LAYER_OPS = (aten.conv2d.default, aten.conv2d.padding, aten.linear.default)
PRODUCT_OPS = (aten.matmul.default, aten.bmm.default)

MOVES = (
    aten.transpose.int,
    aten.permute.default,
    aten.reshape.default,
    aten.view.default,
    aten.expand.default,
    aten.flatten.using_ints,
)
_ROUNDS = (
    torch.ops.deploykit.fake_quantize.default,
    torch.ops.deploykit.fake_quantize_log.default,
    torch.ops.deploykit.fake_quantize_twin.default,
)


def computing_layers(graph_module: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """Every convolution, linear layer and matrix product, in order, with its layer's name."""
    found = []
    for node in graph_module.graph.nodes:
        if is_op(node, *LAYER_OPS):
            found.append((node, layer_name(node)))
        elif is_op(node, *PRODUCT_OPS):
            # A quantised linear layer is a product with its dequantised weight.
            weighted = is_op(node.args[1], torch.ops.deploykit.dequantize.default)
            found.append((node, layer_name(node) if weighted else product_name(node)))
    return found


def product_name(node: fx.Node) -> str:
    """The name that plans and recipes call a product of two activations by."""
    softmax = any(is_softmax_output(arg) for arg in node.args[:2])
    return f"{layer_name(node)}.{'attention_value' if softmax else node.name}"


def is_softmax_output(node: object) -> bool:
    """Whether a node's values are those of a softmax, perhaps rounded, transposed or reshaped."""
    while is_op(node, *MOVES, *_ROUNDS):
        assert isinstance(node, fx.Node)
        node = node.args[0]
    return is_op(node, aten.softmax.int, aten._softmax.default)
