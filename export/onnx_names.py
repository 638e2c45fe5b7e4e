"""Names of layers in an ONNX file: what computes a layer is called as the layer is.

Runtimes name their kernels after the file's nodes, so a profile, an inspector or a viewer of the
file then says which layer it is about. torch's exporters number their nodes instead.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir
from torch import fx

from deploykit.graph.edit import is_op
from deploykit.graph.layer_names import PRODUCT_OPS, computing_layers

__all__ = ["COMPUTING_OPS", "name_layers"]

COMPUTING_OPS = ("Conv", "MatMul", "Gemm")


def name_layers(model: ir.Model, graph_module: fx.GraphModule) -> bool:
    """Name the file's computing nodes after the layers they compute, in place.

    The second node of a layer that runs twice is ``layer#2``.

    Returns:
        Whether it was done. Where the exporter split or merged layers, so that nodes and layers
        can't be told apart by their order, no name is changed: a wrong one is worse than none.
    """
    layers = computing_layers(graph_module)
    nodes = [node for node in model.graph if node.op_type in COMPUTING_OPS]
    if len(nodes) != len(layers):
        return False
    if any(not _fits(node, layer) for node, (layer, _) in zip(nodes, layers, strict=True)):
        return False
    seen: Counter[str] = Counter()
    for node, (_, name) in zip(nodes, layers, strict=True):
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return True


def _fits(node: ir.Node, layer: fx.Node) -> bool:
    if is_op(layer, *PRODUCT_OPS):
        return node.op_type == "MatMul"
    linear = "linear" in str(layer.target)
    return node.op_type in (("MatMul", "Gemm") if linear else ("Conv",))
