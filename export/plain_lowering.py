"""A quantised graph in operators that other converters know.

PyTorch's own converters (ExecuTorch, LiteRT) read quantised graphs as ``quantized_decomposed``
operators on int8; our operators they don't know. Codes stay as they are: ours are unsigned, so
128 is taken from each code and each zero point.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import add_tensor, clean, constant, is_op

__all__ = ["Lowered", "WeightCodes", "lower_plainly"]

aten = torch.ops.aten
_OURS = torch.ops.deploykit
_PLAIN = torch.ops.quantized_decomposed
_LAYERS = (aten.linear.default, aten.conv2d.default, aten.conv2d.padding)
_FUSED = (aten.relu.default, aten.hardtanh.default, aten.relu6.default)
_MIDDLE = 128


@dataclass(frozen=True)
class WeightCodes:
    """A layer's weight, kept beside a graph that holds it as floats.

    Attributes:
        codes: int8 (out, ...), as PyTorch orders a linear layer's or convolution's weight.
        scale: float32 (out,); the graph's floats are ``codes * scale``.
        bits: width of the codes.
        kind: of the layer: ``static``, ``dynamic`` or ``weight_only``.
        keeps_grid: a dynamic layer's input is narrower than 8 bits and must stay on its grid.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    kind: str
    keeps_grid: bool


@dataclass(frozen=True)
class Lowered:
    """A graph without our operators.

    Attributes:
        graph_module: input (N, 3, S, S), output (N, classes); the given one is left alone.
        static: layers with integer weights whose input and output lie on fixed grids.
        dynamic: layers with integer weights and input whose output is a float.
        weight_only: layers with integer weights and float input.
        codes: weights that became floats in the graph.
    """

    graph_module: fx.GraphModule
    static: tuple[str, ...]
    dynamic: tuple[str, ...]
    weight_only: tuple[str, ...]
    codes: tuple[WeightCodes, ...]


def lower_plainly(graph_module: fx.GraphModule, *, codes_in_graph: bool) -> Lowered:
    """Rewrite a captured or quantised graph; a captured one has nothing to rewrite.

    Mobile runtimes' integer layers write integers, so a layer whose output has no grid can't run
    on the graph's grid. A linear layer of that kind chooses its input's grid when it runs, row
    by row at 8 bits; an 8-bit grid of the graph would only be a second rounding and should go.

    Args:
        codes_in_graph: True keeps the weights of static layers and dynamic linear layers as
            codes behind a dequantise operator, and makes the others floats; False makes all of
            them floats, and keeps all grids, for a converter that is told the codes afterwards.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own pytree warns about itself when copied
        graph_module = copy.deepcopy(graph_module)
    _linear_again(graph_module)
    found: dict[str, list[str]] = {"static": [], "dynamic": [], "weight_only": []}
    codes = []
    for node in list(graph_module.graph.nodes):
        if not (is_op(node, *_LAYERS) and is_op(node.args[1], _OURS.dequantize.default)):
            continue
        if len(node.args) > 2 and is_op(node.args[2], _OURS.dequantize.default):
            _fold(graph_module, node, 2)
        kind = _kind(node)
        found[kind].append(node.name)
        chooses = kind == "dynamic" and is_op(node, aten.linear.default)
        keeps = kind == "dynamic" and node.args[0].args[3] < 8
        if codes_in_graph and chooses:
            _choose_input_grid(graph_module, node, keeps)
        elif not codes_in_graph or kind != "static":
            codes.append(WeightCodes(*_fold(graph_module, node, 1), kind, keeps))
    for node in list(graph_module.graph.nodes):
        rewrite = _REWRITES.get(node.target) if node.op == "call_function" else None
        if rewrite is not None:
            rewrite(graph_module, node)
    clean(graph_module)
    return Lowered(
        graph_module,
        tuple(found["static"]),
        tuple(found["dynamic"]),
        tuple(found["weight_only"]),
        tuple(codes),
    )


def _kind(layer: fx.Node) -> str:
    if not is_op(layer.args[0], _OURS.fake_quantize.default):
        return "weight_only"
    return "static" if _output_is_quantized(layer) else "dynamic"


def _output_is_quantized(node: fx.Node) -> bool:
    """Whether the only reader of a layer, perhaps behind a ReLU, is a quantiser."""
    users = list(node.users)
    if len(users) == 1 and is_op(users[0], *_FUSED):
        users = list(users[0].users)
    return len(users) == 1 and is_op(users[0], _OURS.fake_quantize.default)


def _linear_again(graph_module: fx.GraphModule) -> None:
    """``x @ dequantize(codes^T) + bias`` as one linear operator with codes (out, in)."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not is_op(node, aten.matmul.default):
            continue
        x, weight = node.args
        if not (is_op(weight, _OURS.dequantize.default) and weight.args[2] == 1):
            continue
        codes, scale, _, bits = weight.args
        tensor = constant(graph_module, codes)
        if tensor is None or tensor.ndim != 2:
            continue
        turned = add_tensor(graph_module, f"{codes.target}_rows", tensor.t(), node)
        last, bias = node, None
        users = list(node.users)
        if len(users) == 1 and is_op(users[0], aten.add.Tensor) and users[0].args[0] is node:
            value = constant(graph_module, users[0].args[1])
            if value is not None and value.shape == (tensor.shape[1],):
                last, bias = users[0], users[0].args[1]
        with graph.inserting_before(last):
            rows = graph.call_function(_OURS.dequantize.default, (turned, scale, 0, bits))
            result = graph.call_function(aten.linear.default, (x, rows, bias))
        result.meta = dict(node.meta)
        last.replace_all_uses_with(result)
        graph.erase_node(last)
        if last is not node:
            graph.erase_node(node)


def _fold(graph_module: fx.GraphModule, layer: fx.Node, index: int) -> tuple[Tensor, Tensor, int]:
    """Replace a dequantised argument of a layer by its floats; its codes, scale and bits."""
    source = layer.args[index]
    assert isinstance(source, fx.Node)
    codes, scale = (constant(graph_module, arg) for arg in source.args[:2])
    assert codes is not None
    assert scale is not None
    value = _OURS.dequantize.default(codes, scale, *source.args[2:])
    new = add_tensor(graph_module, f"{layer.name}_float_{index}", value, layer)
    layer.update_arg(index, new)
    bits = source.args[3]
    assert isinstance(bits, int)
    return codes, scale, bits


def _choose_input_grid(graph_module: fx.GraphModule, layer: fx.Node, keeps_grid: bool) -> None:
    """Let a layer quantise its input when it runs, each row with a grid of its own."""
    source = layer.args[0]
    assert isinstance(source, fx.Node)
    if not keeps_grid:
        source = source.args[0]
    graph = graph_module.graph
    with graph.inserting_before(layer):
        chosen = graph.call_function(
            _PLAIN.choose_qparams_per_token_asymmetric.default, (source, torch.int8)
        )
        grid = [graph.call_function(operator.getitem, (chosen, index)) for index in (0, 1)]
        codes = graph.call_function(
            _PLAIN.quantize_per_token.default, (source, *grid, -128, 127, torch.int8)
        )
        value = graph.call_function(
            _PLAIN.dequantize_per_token.default,
            (codes, *grid, -128, 127, torch.int8, torch.float32),
        )
    layer.update_arg(0, value)


def _weight(graph_module: fx.GraphModule, node: fx.Node) -> None:
    codes, scale, axis, bits = node.args
    steps = constant(graph_module, scale)
    assert steps is not None
    assert isinstance(bits, int)
    zeros = torch.zeros(len(steps), dtype=torch.int64)
    zero_points = add_tensor(graph_module, f"{node.name}_zero_points", zeros, node)
    # packed 4-bit codes exist only for layers that choose their input's grid
    choosing = [is_op(x, _PLAIN.dequantize_per_token.default) for u in node.users for x in u.args]
    last = 2 ** (3 if bits <= 4 and any(choosing) else 7)
    with graph_module.graph.inserting_before(node):
        plain = graph_module.graph.call_function(
            _PLAIN.dequantize_per_channel.default,
            (codes, scale, zero_points, axis, -last, last - 1, torch.int8),
        )
    node.replace_all_uses_with(plain)


def _uniform(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Quantise once, dequantise once for each reader: a converter joins a reader with its own."""
    x, scale, zero_point, bits = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(scale, float)
    assert isinstance(zero_point, int)
    assert isinstance(bits, int)
    graph = graph_module.graph
    grid = (scale, zero_point - _MIDDLE, -_MIDDLE, _MIDDLE - 1, torch.int8)
    with graph.inserting_before(node):
        if bits < 8:  # clipped first, an 8-bit grid has exactly the narrow codes
            low, high = (scale * (code - zero_point) for code in (0, 2**bits - 1))
            x = graph.call_function(aten.clamp.default, (x, low, high))
        codes = graph.call_function(_PLAIN.quantize_per_tensor.default, (x, *grid))
    for user in list(node.users):
        with graph.inserting_before(user):
            value = graph.call_function(_PLAIN.dequantize_per_tensor.default, (codes, *grid))
        user.replace_input_with(node, value)


def _logarithmic(graph_module: fx.GraphModule, node: fx.Node) -> None:
    x, shift, rate, offset, values, *_ = node.args
    call = _caller(graph_module, node)
    if shift != 0:
        x = call(aten.add.Tensor, x, shift)
    # log and not log2, relu first: what phones' kernels have, without a NaN
    code = call(aten.log.default, call(aten.relu.default, x))
    code = call(aten.mul.Tensor, code, -rate / 0.6931471805599453)  # type: ignore[operator]
    if offset != 0:
        code = call(aten.add.Tensor, code, offset)
    _look_up(graph_module, node, call(aten.round.default, code), values)


def _twin(graph_module: fx.GraphModule, node: fx.Node) -> None:
    x, split, low_step, high_step, values, *_ = node.args
    assert isinstance(values, Sequence)
    call = _caller(graph_module, node)
    moved = call(aten.sub.Tensor, x, split) if split != 0 else x
    below = call(aten.lt.Scalar, x, split)
    low = call(aten.div.Tensor, moved, low_step)
    high = call(aten.div.Tensor, moved, high_step)
    code = call(aten.round.default, call(aten.where.self, below, low, high))
    code = call(aten.add.Tensor, code, len(values) // 2)
    _look_up(graph_module, node, code, values)


def _look_up(graph_module: fx.GraphModule, node: fx.Node, code: fx.Node, values: Any) -> None:
    call = _caller(graph_module, node)
    table = torch.tensor(values, dtype=torch.float32)
    stored = add_tensor(graph_module, f"{node.name}_values", table, node)
    index = call(aten.clamp.default, code, 0.0, float(len(values) - 1))
    index = call(aten.to.dtype, index, torch.int64)
    node.replace_all_uses_with(call(aten.index.Tensor, stored, [index]))


def _caller(graph_module: fx.GraphModule, node: fx.Node) -> Callable[..., fx.Node]:
    def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        with graph_module.graph.inserting_before(node):
            return graph_module.graph.call_function(target, arguments)

    return call


_REWRITES: dict[Any, Callable[[fx.GraphModule, fx.Node], None]] = {
    _OURS.dequantize.default: _weight,
    _OURS.fake_quantize.default: _uniform,
    _OURS.fake_quantize_log.default: _logarithmic,
    _OURS.fake_quantize_twin.default: _twin,
}
