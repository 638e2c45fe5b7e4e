"""Rewrite fused attention as the matmuls it hides."""

from __future__ import annotations

import math

import torch
from torch import fx

from deploykit.graph.edit import is_op

__all__ = ["decompose_attention"]

aten = torch.ops.aten


def decompose_attention(graph_module: fx.GraphModule) -> int:
    """Replace ``scaled_dot_product_attention(q, k, v)`` by ``softmax(q k^T / sqrt(d)) v``.

    Causal, boolean-masked and grouped-query calls are left as they are: no image backbone of
    timm uses them at inference.

    Returns:
        How many calls were rewritten.
    """
    graph = graph_module.graph
    count = 0
    for node in list(graph.nodes):
        if not is_op(node, aten.scaled_dot_product_attention.default):
            continue
        query, key, value = node.args[:3]
        options = dict(
            zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)
        ) | dict(node.kwargs)
        mask = options.get("attn_mask")
        mask_value = mask.meta.get("val") if isinstance(mask, fx.Node) else None
        boolean = mask_value is not None and mask_value.dtype == torch.bool
        if options.get("is_causal") or options.get("enable_gqa") or boolean:
            continue
        scale = options.get("scale") or 1 / math.sqrt(query.meta["val"].shape[-1])
        with graph.inserting_before(node):
            scaled = graph.call_function(aten.mul.Tensor, (query, float(scale)))
            key_t = graph.call_function(aten.transpose.int, (key, -2, -1))
            logits = graph.call_function(aten.matmul.default, (scaled, key_t))
            if mask is not None:
                logits = graph.call_function(aten.add.Tensor, (logits, mask))
            weights = graph.call_function(aten.softmax.int, (logits, -1))
            result = graph.call_function(aten.matmul.default, (weights, value))
        for new in (scaled, key_t, logits, weights, result):
            new.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        count += 1
    return count
