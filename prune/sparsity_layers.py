"""Which layers can take a pattern of zeros, and where they would run faster: by shape alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import fx

from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import constant, is_op, layer_name
from deploykit.prune.sparsity_patterns import Pattern, parse_pattern

__all__ = ["GAIN_CHANNELS", "LayerRow", "eligible_layers"]

aten = torch.ops.aten

LAYER_OPS = (aten.linear.default, aten.conv2d.default, aten.conv2d.padding)
GAIN_CHANNELS = 256
"""NVIDIA's maintainers see gains from so many inputs and outputs on (TensorRT issue 4065)."""


@dataclass(frozen=True)
class LayerRow:
    """One linear layer or convolution.

    Attributes:
        node: name of its node in the graph.
        layer: dotted module name.
        op: ``linear`` or ``conv2d``.
        outputs, inputs: channels; ``inputs`` of one group.
        kernel: ``()`` or (height, width).
        weights: how many.
        eligible: the pattern can be put on it.
        reason: why not, or "".
        tensorrt: TensorRT may run it on sparse tensor cores (ungrouped, 2:4, outputs / 8,
            inputs / 16). Whether it does is its own choice.
        cusparselt: torch on CUDA can in float16 or bfloat16 (linear, 2:4, both sides / 16).
        gains: one of them, and large enough (256 channels on both sides) to be faster at all.
    """

    node: str
    layer: str
    op: str
    outputs: int
    inputs: int
    kernel: tuple[int, ...]
    weights: int
    eligible: bool
    reason: str
    tensorrt: bool
    cusparselt: bool
    gains: bool

    def declined(self, reason: str) -> LayerRow:
        """The same layer, left dense."""
        return replace(
            self, eligible=False, reason=reason, tensorrt=False, cusparselt=False, gains=False
        )

    def plain(self) -> dict[str, Any]:
        """For a record: JSON data."""
        return asdict(self) | {"kernel": list(self.kernel)}


def eligible_layers(captured: CapturedModel, pattern: str) -> list[LayerRow]:
    """Every linear layer and 2-D convolution, and whether it can take the pattern.

    ``2:4`` wants ungrouped layers with outputs divisible by 8 and inputs by 16 (the rule of
    NVIDIA's ASP, which is TensorRT's); ``n:m`` inputs divisible by m; blocks both sides
    divisible by the block. A weight that two operators read, or that is computed while the
    model runs, is left alone.

    Raises:
        UsageError: no such pattern.
    """
    wanted = parse_pattern(pattern)
    graph_module = captured.graph_module
    readers = _readers(graph_module)
    rows = []
    for node in graph_module.graph.nodes:
        if is_op(node, *LAYER_OPS):
            rows.append(_row(graph_module, node, wanted, readers))
    return rows


def _readers(graph_module: fx.GraphModule) -> Counter[int]:
    """How many operators read the memory of each tensor, by its address."""
    count: Counter[int] = Counter()
    for node in graph_module.graph.nodes:
        value = constant(graph_module, node)
        if value is not None:
            count[value.data_ptr()] += len(node.users)
    return count


def _row(
    graph_module: fx.GraphModule, node: fx.Node, pattern: Pattern, readers: Counter[int]
) -> LayerRow:
    weight = constant(graph_module, node.args[1])
    shape = _shape(node.args[1]) if weight is None else weight.shape
    linear = is_op(node, aten.linear.default)
    groups = 1 if linear or len(node.args) < 7 else node.args[6]
    outputs, inputs, *kernel = [*shape, 0, 0][: max(len(shape), 2)]
    if weight is None:
        reason = "its weight is computed while the model runs (or is quantised already)"
    elif not weight.is_floating_point() or weight.ndim not in (2, 4):
        reason = f"its weight is {weight.dtype} with {weight.ndim} axes"
    elif groups != 1:
        reason = "grouped convolution"
    elif readers[weight.data_ptr()] > 1:
        reason = "its weight is read by another operator, too"
    else:
        reason = _misfit(outputs, inputs, pattern)
    whole = not reason and pattern.on_tensor_cores
    cusparselt = whole and linear and outputs % 16 == 0 and inputs % 16 == 0
    return LayerRow(
        node=node.name,
        layer=layer_name(node),
        op="linear" if linear else "conv2d",
        outputs=outputs,
        inputs=inputs,
        kernel=tuple(kernel),
        weights=0 if weight is None else weight.numel(),
        eligible=not reason,
        reason=reason,
        tensorrt=whole,
        cusparselt=cusparselt,
        gains=whole and min(outputs, inputs) >= GAIN_CHANNELS,
    )


def _shape(node: object) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _misfit(outputs: int, inputs: int, pattern: Pattern) -> str:
    """Why the shape doesn't take the pattern, or ""."""
    rows, columns = {"n:m": (1, pattern.group), "block": (pattern.block,) * 2}.get(
        pattern.kind, (1, 1)
    )
    if pattern.on_tensor_cores:
        rows, columns = 8, 16
    if outputs % rows == 0 and inputs % columns == 0:
        return ""
    wanted = f"inputs / {columns}" + (f", outputs / {rows}" if rows > 1 else "")
    return f"{inputs} inputs, {outputs} outputs: {pattern} wants {wanted}"
