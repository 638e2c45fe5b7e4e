"""Writing quantisers and integer codes into a graph."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from deploykit.graph.edit import add_tensor, clean, constant, is_op
from deploykit.graph.layer_names import MOVES
from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.weights import QuantizedWeight, quantize_bias

__all__ = [
    "OUTPUT_BITS",
    "Inserted",
    "activation_of",
    "insert_quantizers",
    "needs_output_quantizer",
]

aten = torch.ops.aten

OUTPUT_BITS = 8
_CLIPS = (
    aten.relu.default,
    aten.relu_.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
)

Key = tuple[str, int]  # source node, bits


@dataclass
class Inserted:
    """Counts for the report."""

    activations: int = 0
    outputs: int = 0
    weights: int = 0
    biases: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)


def activation_of(node: fx.Node) -> fx.Node:
    """The ReLU-like node a convolution is fused with by runtimes, or the convolution itself."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_op(users[0], *_CLIPS) else node


def needs_output_quantizer(node: fx.Node, plans: Mapping[str, LayerPlan]) -> bool:
    """Whether a convolution's result reaches anything but layers that read it at 8 bits.

    Integer convolution kernels write 8-bit integers, so a convolution runs in float unless its
    output is quantised too. (Matrix products may write floats and need none.)

    One that is joined with something else, such as a ViT's patches with its class token, is left
    alone: OpenVINO carries the 8-bit codes through the Concat and rounds the other part as well.
    """
    if _joins_others(activation_of(node)):
        return False
    for user in activation_of(node).users:
        plan = plans.get(user.name)
        if plan is None or plan.input_bits != OUTPUT_BITS:
            return True
    return False


def _joins_others(node: fx.Node) -> bool:
    """Whether a result meets, perhaps reshaped, anything but other convolutions in a Concat."""
    for user in node.users:
        if is_op(user, *MOVES) and user.args[0] is node and _joins_others(user):
            return True
        if is_op(user, aten.cat.default) and not all(
            _is_convolution(part)
            for part in user.args[0]  # type: ignore[union-attr]
        ):
            return True
    return False


def _is_convolution(node: object) -> bool:
    while is_op(node, *MOVES, *_CLIPS):
        assert isinstance(node, fx.Node)
        node = node.args[0]
    return is_op(node, aten.conv2d.default, aten.conv2d.padding)


def insert_quantizers(
    graph_module: fx.GraphModule,
    plans: Mapping[str, LayerPlan],
    activations: Mapping[Key, FittedQuantizer],
    outputs: Mapping[str, FittedQuantizer],
    weights: Mapping[str, QuantizedWeight],
) -> Inserted:
    """Turn a float graph into a quantised graph, in place.

    Args:
        plans: by node name.
        activations: quantiser of each (source node, bits) pair a plan needs.
        outputs: quantiser of each convolution whose output is quantised, by the convolution's
            node name.
        weights: codes by layer node name.
    """
    graph = graph_module.graph
    done = Inserted()
    quantized: dict[Key, fx.Node] = {}
    nodes = {node.name: node for node in graph.nodes}

    for name, quantizer in outputs.items():
        source = activation_of(nodes[name])
        with graph.inserting_after(source):
            new = quantizer.insert(graph, source)
        _adopt(new, source)
        source.replace_all_uses_with(new, delete_user_cb=partial(operator.is_not, new))
        quantized[source.name, quantizer.bits] = new
        done.outputs += 1

    def quantize_input(source: object, bits: int) -> fx.Node:
        assert isinstance(source, fx.Node)
        origin = _origin(source)
        key = (origin.name, bits)
        if key not in quantized:
            quantizer = activations[key]
            with graph.inserting_after(source):
                quantized[key] = quantizer.insert(graph, source)
            _adopt(quantized[key], source)
            done.activations += 1
            kind = str(quantizer.describe()["kind"])
            done.by_kind[kind] = done.by_kind.get(kind, 0) + 1
        return quantized[key]

    scales: dict[str, float | None] = {}
    for name, plan in plans.items():
        if plan.input_bits == FLOAT:
            continue
        node = nodes[name]
        new_inputs = [quantize_input(arg, plan.input_bits) for arg in node.args[: plan.inputs]]
        node.args = (*new_inputs, *node.args[plan.inputs :])
        fitted = activations.get((_origin(new_inputs[0]).name, plan.input_bits))
        fitted = fitted or outputs.get(_producer(new_inputs[0]))
        scales[name] = fitted.scale if isinstance(fitted, UniformQuantizer) else None
    # Only now: writing a weight may replace its node, whose name the quantisers go by.
    for name in plans:
        if name in weights:
            _write_weight(
                graph_module, nodes[name], plans[name], weights[name], scales.get(name), done
            )
    clean(graph_module)
    return done


def _adopt(new: fx.Node, source: fx.Node) -> None:
    new.meta = {
        "nn_module_stack": source.meta.get("nn_module_stack", {}),
        "quantizes": source.meta.get("quantizes", source.name),
    }


def _origin(node: object) -> fx.Node:
    """The float node behind a quantiser, or the node itself."""
    assert isinstance(node, fx.Node)
    while "quantizes" in node.meta:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _producer(node: object) -> str:
    """The convolution whose output quantiser ``node`` is."""
    origin = _origin(node)
    if is_op(origin, *_CLIPS):
        source = origin.args[0]
        assert isinstance(source, fx.Node)
        return source.name
    return origin.name


def _write_weight(
    graph_module: fx.GraphModule,
    node: fx.Node,
    plan: LayerPlan,
    weight: QuantizedWeight,
    input_scale: float | None,
    done: Inserted,
) -> None:
    graph = graph_module.graph
    stem = plan.layer
    # A linear layer becomes x @ W^T + b with W^T stored as such: runtimes fuse a dequantised
    # operand into the product only if nothing, such as a transpose, lies between. On (N, features)
    # it stays one operator, which becomes a Gemm with an integer bias.
    as_matmul = plan.op == "linear" and _rank(node) != 2
    codes, axis = (weight.codes.t(), 1) if as_matmul else (weight.codes, 0)
    codes_node = add_tensor(graph_module, f"{stem}.weight_codes", codes, node)
    scale_node = add_tensor(graph_module, f"{stem}.weight_scale", weight.scale, node)
    dequantize = torch.ops.deploykit.dequantize.default
    with graph.inserting_before(node):
        weight_node = graph.call_function(dequantize, (codes_node, scale_node, axis, weight.bits))
    done.weights += 1
    bias_node = node.args[2] if len(node.args) > 2 else None
    if not as_matmul:
        bias_node = _write_bias(graph_module, node, plan, weight, input_scale, done)
    if as_matmul:
        meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}
        with graph.inserting_before(node):
            result = graph.call_function(aten.matmul.default, (node.args[0], weight_node))
            result.meta = dict(meta)
            if bias_node is not None:
                result = graph.call_function(aten.add.Tensor, (result, bias_node))
                result.meta = dict(meta)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        return
    node.args = (node.args[0], weight_node, bias_node, *node.args[3:])


def _rank(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return None if value is None else int(value.ndim)


def _write_bias(
    graph_module: fx.GraphModule,
    node: fx.Node,
    plan: LayerPlan,
    weight: QuantizedWeight,
    input_scale: float | None,
    done: Inserted,
) -> fx.Node | None:
    """The bias as int32 codes where the layer's input is on a uniform grid, else as it is."""
    bias_node = node.args[2] if len(node.args) > 2 else None
    bias: Tensor | None = constant(graph_module, bias_node)
    if bias is None or input_scale is None:
        return bias_node if isinstance(bias_node, fx.Node) else None
    quantized = quantize_bias(bias, input_scale, weight)
    codes = add_tensor(graph_module, f"{plan.layer}.bias_codes", quantized.codes, node)
    scale = add_tensor(graph_module, f"{plan.layer}.bias_scale", quantized.scale, node)
    with graph_module.graph.inserting_before(node):
        dequantize = torch.ops.deploykit.dequantize.default
        result = graph_module.graph.call_function(dequantize, (codes, scale, 0, 32))
    done.biases += 1
    return result
