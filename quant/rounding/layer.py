"""Layer by layer through the network: round each weight against what really reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.quantized import FLOAT
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.ranges import weight_scale
from deploykit.quant.rounding.closed_form import (
    gptq_codes,
    remaining_error,
    ridge_correction,
)
from deploykit.quant.rounding.moments import LayerMoments, LayerShape
from deploykit.quant.state import Executor, QuantState
from deploykit.quant.units import Unit
from deploykit.quant.weights import QuantizedWeight, bias_floor

__all__ = ["Rounding", "RoundingOptions", "UnitData", "round_unit"]

Rounding = Literal["nearest", "gptq", "erq"]


@dataclass(frozen=True)
class RoundingOptions:
    """``erq`` is the ridge correction, then GPTQ; every method may correct the bias.

    Attributes:
        ridges: dampings of the ridge correction that are tried, parts of the mean input variance.
        damping: of GPTQ's covariance; to it comes ``inputs / rows``, since a covariance of few
            rows is small in directions that it merely hasn't seen.
    """

    method: Rounding = "erq"
    weight_range: Literal["minmax", "mse"] = "mse"
    bias_correction: bool = True
    ridges: tuple[float, ...] = (0.03, 0.3, 3.0)
    damping: float = 0.01


@dataclass
class UnitData:
    """A unit's inputs over all images, in batches: the float model's and the quantised one's.

    Attributes:
        counts: images of every batch.
    """

    float_inputs: list[Tensor]
    quantized_inputs: list[Tensor]
    counts: list[int]


def round_unit(
    executor: Executor,
    state: QuantState,
    unit: Unit,
    data: UnitData,
    options: RoundingOptions,
) -> None:
    """Choose the codes and biases of a unit's layers, one after the other, into ``state``.

    Each layer is fitted on the input it gets from everything quantised before it, towards the
    output it has in the float model.
    """
    for name in unit.layers:
        if state.plans[name].weight_bits in (None, FLOAT):
            continue
        node = next(node for node in unit.nodes if node.name == name)
        _round_layer(executor, state, unit, node, data, options)


@torch.no_grad()
def _round_layer(
    executor: Executor,
    state: QuantState,
    unit: Unit,
    node: fx.Node,
    data: UnitData,
    options: RoundingOptions,
) -> None:
    plan = state.plans[node.name]
    weight = constant(executor.graph_module, node.args[1])
    bias = constant(executor.graph_module, node.args[2]) if len(node.args) > 2 else None
    assert weight is not None and plan.weight_bits is not None
    shape = LayerShape.of(node, weight)
    moments = LayerMoments(shape)
    hooks = state.hooks(executor.graph_module.graph)
    seen: dict[str, list[Tensor]] = {}

    def watch(_: fx.Node, args: object) -> None:
        seen["args"] = state.quantized_inputs(node, args)  # type: ignore[arg-type]

    watching = {**hooks, node.name: watch}
    for x, xq, count in zip(data.float_inputs, data.quantized_inputs, data.counts, strict=True):
        wanted = executor.run(unit.nodes, unit.source, x, count, stop=node)
        executor.run(unit.nodes, unit.source, xq, count, watching, stop=node)
        args = seen["args"]
        moments.update(node, args, wanted - node.target(*args))  # type: ignore[operator]

    matrices = shape.matrices(weight.float())
    both = moments.both
    covariance = both.covariance()
    target = matrices
    if options.method == "erq":
        target = matrices + _correction(moments, options.ridges)
    scale = weight_scale(target.reshape(weight.shape), plan.weight_bits, options.weight_range)
    quantizer = state.input_quantizer(node)
    if bias is not None and isinstance(quantizer, UniformQuantizer):
        scale = torch.maximum(scale, bias_floor(bias, quantizer.scale))
    steps = scale.reshape(shape.groups, shape.outputs)
    if options.method == "nearest":
        high = 2 ** (plan.weight_bits - 1)
        codes = torch.round(target / steps[..., None]).clamp_(-high, high - 1)
    else:
        damping = options.damping + shape.inputs / both.rows
        codes = gptq_codes(target, steps, plan.weight_bits, covariance, damping)
    state.targets[node.name] = target.reshape(weight.shape)
    change = codes * steps[..., None] - matrices
    state.weights[node.name] = QuantizedWeight(
        codes.reshape(weight.shape).to(torch.int8), scale, plan.weight_bits
    )
    if options.bias_correction:
        # The mean error of the output is made up for exactly, whatever the weight became.
        drift = both.error_mean - (change @ both.input_mean[..., None])[..., 0]
        old = torch.zeros(len(weight)) if bias is None else bias.float()
        state.biases[node.name] = old + drift.reshape(-1)


def _correction(moments: LayerMoments, ridges: Sequence[float]) -> Tensor:
    """The ridge correction whose damping did best on the half of the rows it wasn't fitted on.

    None at all if every one made that half worse: few rows predict noise.
    """
    fitted, unseen = moments.halves
    best, best_error = None, 0.0
    for ridge in ridges:
        change = ridge_correction(fitted.covariance(), fitted.cross_covariance(), ridge)
        error = remaining_error(change, unseen.covariance(), unseen.cross_covariance())
        if error < best_error:
            best, best_error = ridge, error
    both = moments.both
    if best is None:
        shape = both.shape
        return torch.zeros(shape.groups, shape.outputs, shape.inputs)
    return ridge_correction(both.covariance(), both.cross_covariance(), best)
