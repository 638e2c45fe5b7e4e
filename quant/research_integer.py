"""Research: softmax, GELU and LayerNorm of a captured graph on integers alone.

A simulation. The new operators take and give floats, as their neighbours do, but between
rounding to codes and scaling back everything is ``integer_ops``. No exporter lowers them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.errors import DeploykitError
from deploykit.graph.edit import add_tensor, clean, is_op
from deploykit.quant.integer_ops import int_gelu, int_layer_norm, int_softmax
from deploykit.types import PassRecord

__all__ = ["replace_with_integer_ops"]

aten = torch.ops.aten

NORM_BITS = 16  # I-ViT keeps the residual stream, which LayerNorm reads, at 16 bits
_REPLACED = (aten.softmax.int, aten.gelu.default, aten.layer_norm.default)


@torch.library.custom_op("deploykit::research_int_softmax", mutates_args=())
def research_int_softmax(x: Tensor, scale: float, dim: int, bits: int) -> Tensor:
    """``int_softmax`` of ``x`` (float32, any shape), rounded to ``bits`` with ``scale`` before."""
    codes, out_scale = int_softmax(_codes(x, scale, bits), scale, bits, dim)
    return (codes * out_scale).to(x.dtype)


@research_int_softmax.register_fake
def _(x: Tensor, scale: float, dim: int, bits: int) -> Tensor:  # noqa: ARG001  (same signature)
    return torch.empty_like(x)


@torch.library.custom_op("deploykit::research_int_gelu", mutates_args=())
def research_int_gelu(x: Tensor, scale: float, bits: int) -> Tensor:
    """``int_gelu`` of ``x`` (float32, any shape), rounded to ``bits`` with ``scale`` before."""
    codes, out_scale = int_gelu(_codes(x, scale, bits), scale, bits)
    return (codes * out_scale).to(x.dtype)


@research_int_gelu.register_fake
def _(x: Tensor, scale: float, bits: int) -> Tensor:  # noqa: ARG001  (same signature)
    return torch.empty_like(x)


@torch.library.custom_op("deploykit::research_int_layer_norm", mutates_args=())
def research_int_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
    """``int_layer_norm`` of ``x`` (..., C), rounded to ``NORM_BITS`` with ``scale`` before."""
    codes, out_scale = int_layer_norm(_codes(x, scale, NORM_BITS), weight, bias)
    return (codes * out_scale).to(x.dtype)


@research_int_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


def _codes(x: Tensor, scale: float, bits: int) -> Tensor:
    """Symmetric codes of ``bits`` bits, rounded half to even."""
    high = 2 ** (bits - 1)
    return torch.round(x / scale).clamp_(-high, high - 1).to(torch.int64)


def replace_with_integer_ops(
    graph_module: fx.GraphModule, batches: Callable[[], Iterable[Tensor]], bits: int = 8
) -> PassRecord:
    """Exchange softmax, GELU and LayerNorm for simulations of I-ViT's operators, in place.

    Inputs of softmax and GELU are rounded to ``bits``, those of LayerNorm to 16, symmetric, with
    the largest magnitude seen in ``batches`` as the range. Left in float: norms over more than
    the last axis (GroupNorm too), and GELU by tanh, which the paper doesn't approximate.

    Args:
        graph_module: captured graph, image (N, 3, S, S) to logits (N, classes).
        batches: calibration images; called once.
        bits: of softmax and GELU, 2 to 16.

    Raises:
        DeploykitError: bits out of range, no batches, or an input that isn't finite (a mask of
            -inf, say), which symmetric codes can't hold.
    """
    if not 2 <= bits <= 16:
        raise DeploykitError(f"integer operators: wanted 2 to 16 bits, got {bits}")
    chosen = [node for node in graph_module.graph.nodes if _can_replace(node)]
    left = sum(1 for n in graph_module.graph.nodes if is_op(n, *_REPLACED)) - len(chosen)
    ranges = _largest_inputs(graph_module, chosen, batches())
    counts = {"softmax": 0, "gelu": 0, "layer_norm": 0}
    for node in chosen:
        kind = _replace(graph_module, node, ranges[node.name], bits)
        counts[kind] += 1
    clean(graph_module)
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    summary = f"{found} on integers alone (simulated); {left} left in float"
    return PassRecord(name="integer operators", summary=summary, details=counts | {"float": left})


def _can_replace(node: fx.Node) -> bool:
    if is_op(node, aten.layer_norm.default):
        shape = node.args[1]
        assert isinstance(shape, list | tuple)
        return len(shape) == 1
    if is_op(node, aten.gelu.default):
        return node.kwargs.get("approximate", "none") == "none"
    return is_op(node, aten.softmax.int)


class _Largest(fx.Interpreter):
    """Runs a graph and keeps the largest magnitude of chosen nodes' first inputs."""

    def __init__(self, graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
        super().__init__(graph_module)
        self.found = {node.name: 0.0 for node in nodes}

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.found:
            source = n.args[0]
            assert isinstance(source, fx.Node)
            largest = float(self.env[source].abs().max())
            if not math.isfinite(largest):
                message = f"integer operators: the input of {n.name} isn't finite"
                raise DeploykitError(f"{message}; symmetric codes can't hold a mask of -inf")
            self.found[n.name] = max(self.found[n.name], largest)
        return super().run_node(n)


def _largest_inputs(
    graph_module: fx.GraphModule, nodes: list[fx.Node], batches: Iterable[Tensor]
) -> dict[str, float]:
    reader = _Largest(graph_module, nodes)
    seen = False
    with torch.no_grad():
        for batch in batches:
            seen = True
            reader.run(batch)
    if not seen:
        raise DeploykitError("integer operators: no calibration images; give at least one batch")
    return reader.found


def _replace(graph_module: fx.GraphModule, node: fx.Node, largest: float, bits: int) -> str:
    """Exchange one node; returns what it was."""
    graph = graph_module.graph
    x = node.args[0]
    assert isinstance(x, fx.Node)
    kind, width = "layer_norm", NORM_BITS
    if not is_op(node, aten.layer_norm.default):
        kind, width = ("softmax" if is_op(node, aten.softmax.int) else "gelu"), bits
    scale = (largest or 1.0) / (2 ** (width - 1) - 1)
    target: Callable[..., Any]
    args: tuple[Any, ...]
    if kind == "softmax":
        target, args = torch.ops.deploykit.research_int_softmax.default, (
            x, scale, node.args[1], bits,
        )  # fmt: skip
    elif kind == "gelu":
        target, args = torch.ops.deploykit.research_int_gelu.default, (x, scale, bits)
    else:
        weight, bias = (node.args[i] if len(node.args) > i else None for i in (2, 3))
        shape = node.args[1]
        assert isinstance(shape, list | tuple) and isinstance(shape[0], int)
        size = shape[0]
        if weight is None:
            weight = add_tensor(graph_module, f"{node.name}_ones", torch.ones(size), node)
        if bias is None:
            bias = add_tensor(graph_module, f"{node.name}_zeros", torch.zeros(size), node)
        target = torch.ops.deploykit.research_int_layer_norm.default
        args = (x, weight, bias, scale)
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return kind
