"""Layer by layer through the network: round each weight against what really reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.execute import Executor, Hook, Run, call
from deploykit.graph.layer_rows import LayerShape
from deploykit.graph.quantized import FLOAT
from deploykit.graph.units import Unit
from deploykit.quant.rounding.closed_form import (
    gptq_codes,
    remaining_error,
    ridge_correction,
)
from deploykit.quant.rounding.moments import LayerMoments, Moments
from deploykit.quant.state import QuantState
from deploykit.quant.weights import QuantizedWeight, safe_scale, symmetric_codes

__all__ = ["Rounding", "RoundingOptions", "UnitData", "round_unit"]

Rounding = Literal["nearest", "gptq", "erq"]

LIVE_BYTES = 2**30  # of values kept between two layers of a unit, over all images


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
    """A unit's inputs (or outputs) over all images, in batches: the float model's and ours.

    Attributes:
        counts: images of every batch.
    """

    floats: list[Tensor]
    quantized: list[Tensor]
    counts: list[int]


@torch.no_grad()
def round_unit(
    executor: Executor,
    state: QuantState,
    unit: Unit,
    data: UnitData,
    options: RoundingOptions,
    hooks: Mapping[str, Hook],
) -> UnitData:
    """Choose the codes and biases of a unit's layers, one after the other, into ``state``.

    Each layer is fitted on the input it gets from everything quantised before it, towards the
    output it has in the float model. Both models stop before each layer and go on from there;
    where what they would keep meanwhile is too much, they begin the unit anew.

    Args:
        hooks: ``state.hooks``.

    Returns:
        The unit's outputs.
    """
    floats, quantized = (
        [
            Run(executor, unit.nodes, unit.source, x, count)
            for x, count in zip(inputs, data.counts, strict=True)
        ]
        for inputs in (data.floats, data.quantized)
    )
    share = LIVE_BYTES // (2 * len(data.counts))
    nodes = {node.name: node for node in unit.nodes}
    for name in unit.layers:
        if state.plans[name].weight_bits in (None, FLOAT):
            continue
        node = nodes[name]
        weight = constant(executor.graph_module, node.args[1])
        assert weight is not None
        moments = LayerMoments(LayerShape.of(node, weight))
        for run, run_q in zip(floats, quantized, strict=True):
            run.before(node, {})
            wanted = run.step({})
            args = state.quantized_inputs(node, run_q.before(node, hooks))
            moments.update(node, args, wanted - call(node, args))
            for each in (run, run_q):
                if each.live_bytes > share:
                    each.rewind()
        _round_layer(executor, state, node, moments, options)
    return UnitData(
        [run.finish({}) for run in floats],
        [run.finish(hooks) for run in quantized],
        data.counts,
    )


def _round_layer(
    executor: Executor,
    state: QuantState,
    node: fx.Node,
    moments: LayerMoments,
    options: RoundingOptions,
) -> None:
    plan = state.plans[node.name]
    weight = constant(executor.graph_module, node.args[1])
    bias = constant(executor.graph_module, node.args[2]) if len(node.args) > 2 else None
    assert weight is not None and plan.weight_bits is not None
    shape, both = moments.shape, moments.both()
    covariance = both.covariance()
    matrices = target = shape.matrices(weight.float())
    keep = matrices != 0  # a pruned weight stays so: sparse kernels and packed files need it
    if options.method == "erq":
        target = matrices + _correction(moments, both, options.ridges, keep)
    scale = safe_scale(
        target.reshape(weight.shape),
        plan.weight_bits,
        options.weight_range,
        bias,
        state.input_scale(node),
    )
    steps = scale.reshape(shape.groups, shape.outputs)
    if options.method == "nearest":
        codes = symmetric_codes(target, steps[..., None], plan.weight_bits)
    else:
        damping = options.damping + shape.inputs / both.rows
        codes = gptq_codes(target, steps, plan.weight_bits, covariance, damping, keep)
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


def _correction(
    moments: LayerMoments, both: Moments, ridges: Sequence[float], keep: Tensor
) -> Tensor:
    """The ridge correction whose damping did best on the half of the rows it wasn't fitted on.

    None at all if every one made that half worse: few rows predict noise. It is 0 where ``keep``
    is False.
    """
    fitted, unseen = moments.halves
    covariance, cross = fitted.covariance(), fitted.cross_covariance()
    test_covariance, test_cross = unseen.covariance(), unseen.cross_covariance()
    best, best_error = None, 0.0
    for ridge in ridges:
        change = ridge_correction(covariance, cross, ridge) * keep
        error = remaining_error(change, test_covariance, test_cross)
        if error < best_error:
            best, best_error = ridge, error
    if best is None:
        shape = both.shape
        return torch.zeros(shape.groups, shape.outputs, shape.inputs)
    return ridge_correction(both.covariance(), both.cross_covariance(), best) * keep
