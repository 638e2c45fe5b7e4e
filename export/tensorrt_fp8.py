"""FP8 (E4M3) on NVIDIA GPUs from Ada on: products of values with eight bits, four of exponent.

The library documents FP8 for matrix products only, so convolutions stay float. ``to_fp8`` gives a
graph that runs in torch as the simulation and that the exporter lowers, as quantised graphs are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import add_tensor, clean, constant, is_op, layer_name

__all__ = ["fp8_lowerings", "to_fp8"]

aten = torch.ops.aten
_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-100
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@torch.library.custom_op("deploykit::fake_quantize_fp8", mutates_args=())
def fake_quantize_fp8(x: Tensor, scale: float) -> Tensor:
    """``scale * e4m3(clip(x / scale, -448, 448))``, rounded half to even.

    Args:
        x: float32, any shape.
        scale: positive, exactly representable in float32.
    """
    return (x / scale).clamp_(-_LARGEST, _LARGEST).to(_E4M3).to(torch.float32).mul_(scale)


@fake_quantize_fp8.register_fake
def _(x: Tensor, scale: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


@torch.library.custom_op("deploykit::dequantize_fp8", mutates_args=())
def dequantize_fp8(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """E4M3 values times their channel's scale, float32 of the shape of ``codes``.

    Args:
        codes: float8_e4m3fn.
        scale: float32, ``(codes.shape[axis],)``.
    """
    shape = [1] * codes.ndim
    shape[axis] = -1
    return codes.to(torch.float32) * scale.reshape(shape)


@dequantize_fp8.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(codes, dtype=torch.float32)


def to_fp8(captured: CapturedModel, batches: Callable[[], Iterable[Tensor]]) -> fx.GraphModule:
    """A copy of a float graph whose linear layers and products read FP8.

    Activations have one scale, the largest magnitude seen divided by 448; weights have one per
    output.

    Args:
        captured: left unchanged.
        batches: calibration images, float32 (N, 3, S, S).
    """
    graph_module = captured.copy().graph_module
    nodes = [node for node in graph_module.graph.nodes if _is_product(graph_module, node)]
    largest = _observe(graph_module, nodes, batches)
    made: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        node.args = (_quantized(node.args[0], largest, made), *node.args[1:])
        if is_op(node, aten.linear.default):
            _write_weight(graph_module, node)
        else:
            node.args = (node.args[0], _quantized(node.args[1], largest, made))
    clean(graph_module)
    return graph_module


def _is_product(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if is_op(node, aten.linear.default):
        return constant(graph_module, node.args[1]) is not None
    return is_op(node, *_PRODUCTS) and all(
        isinstance(arg, fx.Node) and arg.op != "get_attr" for arg in node.args[:2]
    )


def _activations(node: fx.Node) -> list[fx.Node]:
    count = 1 if is_op(node, aten.linear.default) else 2
    return [arg for arg in node.args[:count] if isinstance(arg, fx.Node)]


def _observe(
    graph_module: fx.GraphModule,
    nodes: Iterable[fx.Node],
    batches: Callable[[], Iterable[Tensor]],
) -> dict[fx.Node, float]:
    """The largest magnitude of every input of the nodes."""
    wanted = {source for node in nodes for source in _activations(node)}
    largest = dict.fromkeys(wanted, 0.0)

    class Observer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in wanted:
                largest[n] = max(largest[n], float(result.abs().max()))
            return result

    with torch.no_grad():
        for batch in batches():
            Observer(graph_module).run(batch)
    return largest


def _quantized(source: Any, largest: dict[fx.Node, float], made: dict[fx.Node, fx.Node]) -> fx.Node:
    if source not in made:
        scale = max(float(np.float32(largest[source] / _LARGEST)), _SMALLEST_SCALE)
        with source.graph.inserting_after(source):
            target = torch.ops.deploykit.fake_quantize_fp8.default
            made[source] = source.graph.call_function(target, (source, scale))
        made[source].meta = copy.copy(source.meta)
    return made[source]


def _write_weight(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """As the quantised graph has it: x @ W^T + b, one operator on (N, features) only."""
    weight = constant(graph_module, node.args[1])
    assert weight is not None
    scale = (weight.abs().amax(1) / _LARGEST).clamp(min=_SMALLEST_SCALE).float()
    codes = (weight / scale[:, None]).clamp(-_LARGEST, _LARGEST).to(_E4M3)
    value = node.meta.get("val")
    as_matmul = value is None or value.ndim != 2
    codes, axis = (codes.t(), 1) if as_matmul else (codes, 0)
    stem, graph = layer_name(node), graph_module.graph
    codes_node = add_tensor(graph_module, f"{stem}.weight_fp8", codes, node)
    scale_node = add_tensor(graph_module, f"{stem}.weight_scale", scale, node)
    target = torch.ops.deploykit.dequantize_fp8.default
    with graph.inserting_before(node):
        weight_node = graph.call_function(target, (codes_node, scale_node, axis))
        if not as_matmul:
            node.args = (node.args[0], weight_node, *node.args[2:])
            return
        result = graph.call_function(aten.matmul.default, (node.args[0], weight_node))
        if len(node.args) > 2 and node.args[2] is not None:
            result = graph.call_function(aten.add.Tensor, (result, node.args[2]))
    result.meta = copy.copy(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _lower_quantize(op: Any, x: Any, scale: float) -> Any:
    step = op.Constant(value=ir.tensor(np.array(scale, np.float32), name="scale"))
    zero = op.Constant(value=ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn), name="zero"))
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)


def _lower_dequantize(op: Any, codes: Any, scale: Any, axis: int) -> Any:
    return op.DequantizeLinear(codes, scale, axis=axis)


def fp8_lowerings() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``onnx_bytes(…, lowerings=…)``."""
    return {
        torch.ops.deploykit.fake_quantize_fp8.default: _lower_quantize,
        torch.ops.deploykit.dequantize_fp8.default: _lower_dequantize,
    }
