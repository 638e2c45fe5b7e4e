"""Quantisation-aware training: weights and layer inputs are rounded while they are trained.

The roundings are put into a training copy of the graph and never leave it. What is returned are
float weights for the ordinary quantiser behind. They lie on the grid they were trained on: left
between its codes, a quantiser that fits its own grid undoes most of what was learnt (measured: at
4 bits the tiny ViT of the tests was then no better than without training).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from deploykit.graph.edit import is_op, layer_name
from deploykit.prune.distill_taps import with_taps
from deploykit.prune.recover_options import QatOptions

__all__ = ["PREFIX", "FakeQuantize", "fit_scale", "insert_fake_quantizers", "rounded_weights"]

aten = torch.ops.aten

FLOAT = 16
PREFIX = "fake_quantize_"
_LAYERS = (aten.linear.default, aten.conv2d.default, aten.conv1d.default)
_SAMPLE = 1 << 16
_SHRINKS = torch.linspace(0.2, 1.0, 33)
_SMALLEST = 1e-8


class _Round(torch.autograd.Function):
    """``(clamp(round(x / s + z), low, high) - z) * s`` with LSQ's gradients.

    Esser et al., "Learned step size quantization", equations 3 and 5: the value's gradient
    passes where its code isn't clamped; the step's is ``round(v) - v`` there, the bound elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, scale: Tensor, zero: Tensor, low: int, high: int
    ) -> Tensor:
        ctx.save_for_backward(value, scale, zero)
        ctx.low, ctx.high = low, high
        codes = (value.float() / scale + zero).round_().clamp_(low, high)
        return codes.sub_(zero).mul_(scale).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        value, scale, zero = ctx.saved_tensors
        place = value.float() / scale + zero
        rounded = place.round()
        code = rounded.clamp(ctx.low, ctx.high)
        inside = rounded == code  # torch's own learnable rounding draws the line there too
        on_scale = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, code - place, code - zero)
            on_scale = (slope * gradient.float()).sum_to_size(scale.shape)
        return gradient * inside, on_scale, None, None, None


class FakeQuantize(nn.Module):
    """Rounds to ``high - low + 1`` values and back; its step may be learnt.

    The step is learnt as a logarithm, so AdamW's steps are relative to it (Jain et al., "Trained
    quantization thresholds", section 3.2), and its gradient is divided by ``sqrt(n * high)``
    (LSQ, section 2.2; ``n`` the values that share a step), so that it can't rule the gradient's
    norm.

    Args:
        scale: steps, broadcastable to the value.
        zero: the code of 0, a whole number, of the same shape.
    """

    def __init__(self, scale: Tensor, zero: Tensor, low: int, high: int, *, learnt: bool) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(scale.log(), requires_grad=learnt)
        self.register_buffer("zero", zero)
        self.low, self.high = low, high

    def forward(self, value: Tensor) -> Tensor:
        """The same shape and dtype as ``value``."""
        share = value.numel() / self.log_scale.numel()
        factor = 1 / math.sqrt(share * max(self.high, 1))
        log_scale: Tensor = self.log_scale
        if log_scale.requires_grad:  # the value itself, with a smaller gradient
            log_scale = (log_scale - log_scale * factor).detach() + log_scale * factor
        result = _Round.apply(  # type: ignore[no-untyped-call]
            value, log_scale.exp(), self.zero, self.low, self.high
        )
        assert isinstance(result, Tensor)
        return result


def fit_scale(rows: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Steps and zero codes with the least squared error over shrunken ranges of the values.

    Args:
        rows: (groups, values) float; each row gets its own step.
        symmetric: codes ``-2^(b-1)+1 .. 2^(b-1)-1``; else ``0 .. 2^b-1``.

    Returns:
        steps and zero codes, float32 (groups,) each.
    """
    low, high = _codes(bits, symmetric)
    bottom = rows.amin(1).clamp(max=0)
    top = rows.amax(1).clamp(min=0)
    widest = torch.maximum(-bottom, top) / high if symmetric else (top - bottom) / high
    best = torch.full_like(top, torch.inf)
    steps, zeros = torch.ones_like(top), torch.zeros_like(top)
    for shrink in _SHRINKS.tolist():
        step = (widest * shrink).clamp(min=_SMALLEST)
        zero = torch.zeros_like(step) if symmetric else (-bottom * shrink / step).round()
        codes = (rows / step[:, None] + zero[:, None]).round().clamp(low, high)
        error = ((codes - zero[:, None]) * step[:, None] - rows).square().sum(1)
        improved = error < best
        best = torch.where(improved, error, best)
        steps, zeros = torch.where(improved, step, steps), torch.where(improved, zero, zeros)
    return steps, zeros


@torch.no_grad()
def rounded_weights(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """The weights of a training copy as its roundings make them, by the weight's name.

    They are floats that lie on their channel's learnt grid with no code beyond the symmetric
    range, so a quantiser of the same width that takes its step from the largest weight of a
    channel finds that grid again.
    """
    found = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.args[0].op == "get_attr":
            name = str(node.args[0].target)
            found[name] = graph_module.get_submodule(node.target)(graph_module.get_parameter(name))
    return found


@torch.no_grad()
def insert_fake_quantizers(
    graph_module: fx.GraphModule,
    options: QatOptions,
    batches: Callable[[], Iterable[Tensor]],
) -> dict[str, list[str]]:
    """Round weights per output channel and layer inputs per tensor, in place.

    Layers that read one tensor share its rounding. Products of two activations (attention) stay
    in float.

    Args:
        graph_module: a training copy.
        batches: images to calibrate the inputs' ranges on, float32 (n, 3, S, S).

    Returns:
        Names of layers by their widths, ``w4a8`` ….
    """
    layers = [node for node in graph_module.graph.nodes if _is_layer(node)]
    widths = {node: _bits(node, layers, options) for node in layers}
    sources = {(n.args[0], bits) for n, (_, bits) in widths.items() if bits != FLOAT}
    samples = _samples(graph_module, {source for source, _ in sources}, batches)
    learnt = options.ranges == "learnt"
    shared: dict[tuple[fx.Node, int], fx.Node] = {}
    found: dict[str, list[str]] = {}
    for node in layers:
        weight_bits, input_bits = widths[node]
        found.setdefault(f"w{weight_bits}a{input_bits}", []).append(layer_name(node))
        source, weight = node.args[:2]
        assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
        if weight_bits != FLOAT:
            quantizer = _for_weight(
                graph_module.get_parameter(str(weight.target)), weight_bits, learnt
            )
            name = f"{PREFIX}{node.name}_weight"
            node.replace_input_with(weight, _call(graph_module, name, quantizer, weight, node))
        if input_bits == FLOAT:
            continue
        if (source, input_bits) not in shared:
            scale, zero = fit_scale(samples[source][None], input_bits, symmetric=False)
            quantizer = FakeQuantize(
                scale[0], zero[0], *_codes(input_bits, symmetric=False), learnt=learnt
            )
            name = f"{PREFIX}{node.name}_input"
            shared[source, input_bits] = _call(graph_module, name, quantizer, source, node)
        node.replace_input_with(source, shared[source, input_bits])
    graph_module.graph.lint()
    graph_module.recompile()
    return found


def _is_layer(node: fx.Node) -> bool:
    if not is_op(node, *_LAYERS):
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _bits(node: fx.Node, layers: list[fx.Node], options: QatOptions) -> tuple[int, int]:
    edge = options.edge_bits if node in (layers[0], layers[-1]) else 0
    return max(options.weight_bits, edge), max(options.input_bits, edge)


def _codes(bits: int, symmetric: bool) -> tuple[int, int]:
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**bits - 1)


def _for_weight(weight: Tensor, bits: int, learnt: bool) -> FakeQuantize:
    scale, zero = fit_scale(weight.detach().flatten(1), bits, symmetric=True)
    shape = (-1, *[1] * (weight.ndim - 1))
    codes = _codes(bits, symmetric=True)
    return FakeQuantize(scale.view(shape), zero.view(shape), *codes, learnt=learnt)


def _call(
    graph_module: fx.GraphModule, name: str, module: nn.Module, value: fx.Node, before: fx.Node
) -> fx.Node:
    graph_module.add_submodule(name, module)
    with graph_module.graph.inserting_before(before):
        return graph_module.graph.call_module(name, (value,))


def _samples(
    graph_module: fx.GraphModule,
    sources: set[fx.Node],
    batches: Callable[[], Iterable[Tensor]],
) -> dict[fx.Node, Tensor]:
    """Some values of each source, evenly taken, with the least and the largest of all."""
    if not sources:
        return {}
    by_name = {node.name: node for node in sources}
    watched = with_taps(graph_module, by_name)
    kept: dict[fx.Node, list[Tensor]] = {node: [] for node in sources}
    for images in batches():
        for name, value in watched(images).items():
            flat = value.flatten().float()
            ends = torch.stack(flat.aminmax())
            kept[by_name[name]] += [flat[:: max(1, flat.numel() // _SAMPLE)], ends]
    return {node: torch.cat(values) for node, values in kept.items()}
