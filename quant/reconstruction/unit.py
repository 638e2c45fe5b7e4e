"""Reconstructing one unit: its weights' rounding, biases and activation scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from deploykit.graph.edit import constant
from deploykit.graph.execute import Executor, Hook, call
from deploykit.graph.quantized import FLOAT
from deploykit.graph.units import Unit
from deploykit.quant.insert import activation_of
from deploykit.quant.reconstruction.activations import LearntActivation, drop_quantization
from deploykit.quant.reconstruction.losses import OutputLoss
from deploykit.quant.reconstruction.rounding import AdaRoundWeight
from deploykit.quant.rounding.layer import UnitData
from deploykit.quant.state import QuantState, with_output

__all__ = ["LossKind", "ReconstructionOptions", "reconstruct_unit"]

LossKind = Literal["plain", "aphq", "fima"]


@dataclass(frozen=True)
class ReconstructionOptions:
    """BRECQ's loop with QDrop, in fewer and larger steps than the papers': for a CPU.

    Attributes:
        iterations: per unit. The papers use 20,000 with a learning rate of 1e-3.
        rounding_travel: how far a logit can move in all its steps, about (Adam moves it by the
            learning rate each time): from one rounding to the other takes 4.
        rounding_weight: of the penalty that pushes roundings to 0 or 1.
        warm_up: part of the iterations before the penalty starts.
    """

    iterations: int = 400
    batch_size: int = 8
    drop: float = 0.5
    rounding_travel: float = 4.0
    scale_rate: float = 4e-5
    bias_rate: float = 1e-4
    rounding_weight: float = 0.01
    warm_up: float = 0.2
    seed: int = 0


class _Learner:
    """What is learnt of a unit, and the hooks that run the unit with it."""

    def __init__(
        self, executor: Executor, state: QuantState, unit: Unit, drop: float, seed: int
    ) -> None:
        self.state, self.drop = state, drop
        self.generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, AdaRoundWeight] = {}
        self.biases: dict[str, nn.Parameter] = {}
        self.activations: dict[tuple[str, int], LearntActivation] = {}
        nodes = {node.name: node for node in unit.nodes}
        for name in unit.layers:
            plan, node = state.plans[name], nodes[name]
            for key in state.input_keys(node):
                if key not in self.activations:
                    self.activations[key] = LearntActivation(state.activations[key])
            if plan.weight_bits in (None, FLOAT):
                continue
            weight = constant(executor.graph_module, node.args[1])
            assert weight is not None
            start = state.weights[name]
            self.weights[name] = AdaRoundWeight(state.targets.get(name, weight).float(), start)
            bias = state.biases.get(name)
            if bias is None and len(node.args) > 2:
                bias = constant(executor.graph_module, node.args[2])
            if bias is not None:
                self.biases[name] = nn.Parameter(bias.float().clone())

    def groups(self, options: ReconstructionOptions) -> list[dict[str, Any]]:
        scales = [a.scale for a in self.activations.values() if a.scale is not None]
        rate = options.rounding_travel / options.iterations
        return [
            {"params": [w.logits for w in self.weights.values()], "lr": rate},
            {"params": list(self.biases.values()), "lr": options.bias_rate},
            {"params": scales, "lr": options.scale_rate},
        ]

    def hooks(self, unit: Unit) -> dict[str, Hook]:
        hooks: dict[str, Hook] = dict.fromkeys(unit.layers, self._layer)
        nodes = {node.name: node for node in unit.nodes}
        for name in unit.layers:
            if name in self.state.outputs:
                last = activation_of(nodes[name])
                learnt = LearntActivation(self.state.outputs[name])
                hooks[last.name] = with_output(hooks.get(last.name), learnt)
        return hooks

    def _layer(self, node: fx.Node, args: Sequence[Any]) -> Any:
        values = list(args)
        for position, key in enumerate(self.state.input_keys(node)):
            x = values[position]
            values[position] = drop_quantization(
                self.activations[key](x), x, self.drop, self.generator
            )
        if node.name in self.weights:
            values[1] = self.weights[node.name]()
        if node.name in self.biases:
            values[2:3] = [self.biases[node.name]]
        return call(node, values)

    def harden(self) -> None:
        self.state.weights |= {name: weight.harden() for name, weight in self.weights.items()}
        self.state.biases |= {name: bias.detach() for name, bias in self.biases.items()}
        self.state.activations |= {k: a.harden() for k, a in self.activations.items()}


def reconstruct_unit(
    executor: Executor,
    state: QuantState,
    unit: Unit,
    data: UnitData,
    targets: Sequence[Tensor],
    loss: OutputLoss,
    options: ReconstructionOptions,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Learn a unit's roundings, biases and activation scales, and write them to ``state``.

    Args:
        data: its inputs, float and quantised.
        targets: its outputs in the float model, in the same batches.
        loss: of an output against its target.
    """
    learner = _Learner(executor, state, unit, options.drop, options.seed)
    floats, quantized = torch.cat(data.floats), torch.cat(data.quantized)
    wanted = torch.cat(list(targets))
    images = sum(data.counts)
    if not learner.weights or {len(floats), len(wanted)} != {images}:
        return  # nothing to learn, or a first axis that isn't the images
    size = min(options.batch_size, images)
    executor.prepare(torch.empty(size, *executor.image_shape))
    optimizer = torch.optim.Adam(learner.groups(options))
    hooks = learner.hooks(unit)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = torch.Generator().manual_seed(options.seed)
    for step in range(options.iterations):
        index = torch.randperm(len(wanted), generator=order)[:size]
        done = step / options.iterations
        for group, rate in zip(optimizer.param_groups[1:], rates[1:], strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        x = drop_quantization(quantized[index], floats[index], options.drop, learner.generator)
        output = executor.run(unit.nodes, unit.source, x, size, hooks)
        value = loss(output, wanted[index], step)
        if done >= options.warm_up:
            left = (done - options.warm_up) / (1 - options.warm_up)
            beta = 20 + (2 - 20) * left
            penalty = sum(w.penalty(beta) for w in learner.weights.values())
            value = value + options.rounding_weight * penalty
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        if progress is not None:
            progress(1)
    learner.harden()
