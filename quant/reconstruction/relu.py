"""GELU replaced by ReLU, and the layers around it learnt anew, in float (APHQ-ViT).

What ReLU buys: activations without the negative tail, which few codes serve badly, and no GELU
kernel where the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from deploykit.graph.edit import add_tensor, constant, is_op, layer_name
from deploykit.graph.execute import Executor, Hook, call
from deploykit.graph.layer_names import LAYER_OPS, MOVES
from deploykit.graph.units import Unit, split_units
from deploykit.types import PassRecord

__all__ = ["ReluOptions", "replace_gelu"]

aten = torch.ops.aten


@dataclass(frozen=True)
class ReluOptions:
    """How the layers around a replaced GELU are learnt.

    Attributes:
        clamp: quantile of the positive hidden values beyond which they are cut in the second
            part of the loss, so that few codes will do (the paper: 0.99 at 3 bits, 0.98 at 4).
    """

    iterations: int = 300
    batch_size: int = 8
    rate: float = 1e-4
    clamp: float = 0.98
    seed: int = 0

    @classmethod
    def at(cls, weight_bits: int, seed: int) -> ReluOptions:
        """The paper's clamping quantile for a width."""
        return cls(clamp=0.99 if weight_bits <= 3 else 0.98, seed=seed)


class _Learner:
    """The weights around the GELUs of a unit, as parameters."""

    def __init__(self, graph_module: fx.GraphModule, unit: Unit) -> None:
        self.gelus = [node for node in unit.nodes if is_op(node, aten.gelu.default)]
        inside = set(unit.nodes)
        layers = [layer for gelu in self.gelus for layer in _around(gelu) if layer in inside]
        self.parameters: dict[fx.Node, list[nn.Parameter | None]] = {}
        self.keep: dict[
            fx.Node, Tensor
        ] = {}  # where a weight is 0, as one that was pruned, it stays so
        for layer in dict.fromkeys(layers):
            values = [constant(graph_module, arg) for arg in [*layer.args[1:3], None][:2]]
            assert values[0] is not None
            self.keep[layer] = values[0] != 0
            self.parameters[layer] = [
                None if value is None else nn.Parameter(value.float().clone()) for value in values
            ]

    def hooks(self, clamp: float | None) -> dict[str, Hook]:
        """ReLU in the GELUs' place, cut at a quantile of its positive values if asked."""

        def relu(_: fx.Node, args: Sequence[Any]) -> Any:
            hidden = torch.relu(args[0])
            if clamp is None:
                return hidden
            positive = hidden.detach()[hidden > 0]
            step = max(len(positive) // 100_000, 1)  # torch.quantile takes no more than 16 M
            return hidden.clamp(max=float(torch.quantile(positive[::step], clamp)))

        def layer(node: fx.Node, args: Sequence[Any]) -> Any:
            weight, bias = self.parameters[node]
            assert weight is not None
            return call(node, [args[0], weight * self.keep[node], bias, *args[3:]])

        names = dict.fromkeys([node.name for node in self.parameters], layer)
        return names | dict.fromkeys([gelu.name for gelu in self.gelus], relu)

    def write(self, graph_module: fx.GraphModule) -> None:
        for layer, values in self.parameters.items():
            nodes = [
                None if value is None else add_tensor(
                    graph_module, f"{layer_name(layer)}.relu_{part}", value.detach(), layer
                )
                for part, value in zip(("weight", "bias"), values, strict=True)
            ]  # fmt: skip
            layer.args = (layer.args[0], *nodes, *layer.args[3:])
        for gelu in self.gelus:
            gelu.target = aten.relu.default
            gelu.args, gelu.kwargs = gelu.args[:1], {}


def replace_gelu(
    graph_module: fx.GraphModule,
    images: Sequence[Tensor],
    options: ReluOptions,
    progress: Callable[[float], None] | None = None,
) -> PassRecord:
    """Replace every GELU by ReLU, in place, and learn the layers around it, unit by unit.

    Each unit learns to give the float model's output from what the replaced units before it give:
    ``|O - O_relu|^2 + 2 |O - O_clamped|^2`` (APHQ-ViT, arXiv 2504.02508, eq. 13, unweighted).

    Args:
        images: float32 (N, 3, S, S) batches.
    """
    layers = {node.name for node in graph_module.graph.nodes if is_op(node, *LAYER_OPS)}
    executor = Executor(graph_module)
    units = split_units(graph_module.graph, layers)
    for batch in images:
        executor.prepare(batch)
    counts = [len(batch) for batch in images]
    floats = replaced = list(images)
    done: list[_Learner] = []
    for unit in units:
        wanted = executor.outputs(unit, floats, counts)
        learner = _Learner(graph_module, unit)
        if learner.gelus:
            size = min(options.batch_size, max(counts))  # a model may fix its batch
            inputs, outputs = torch.cat(replaced), torch.cat(wanted)
            _learn(executor, unit, learner, inputs, outputs, replace(options, batch_size=size))
            done.append(learner)
        floats = wanted
        replaced = executor.outputs(unit, replaced, counts, learner.hooks(None))
        if progress is not None:
            progress(1)
    error = sum(float((a - b).square().sum()) for a, b in zip(floats, replaced, strict=True))
    total = sum(float(a.square().sum()) for a in floats)
    for learner in done:
        learner.write(graph_module)
    graph_module.recompile()
    count = sum(len(learner.gelus) for learner in done)
    return PassRecord(
        name="relu_mlp",
        summary=f"{count} GELUs replaced by ReLU, {options.iterations} steps a unit",
        details={"logits_relative_error": error / max(total, 1e-30)},
    )


def _learn(
    executor: Executor,
    unit: Unit,
    learner: _Learner,
    inputs: Tensor,
    wanted: Tensor,
    options: ReluOptions,
) -> None:
    if len(inputs) != len(wanted):
        return  # a first axis that isn't the images
    parameters = [p for pair in learner.parameters.values() for p in pair if p is not None]
    optimizer = torch.optim.Adam(parameters, lr=options.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.iterations)
    generator = torch.Generator().manual_seed(options.seed)
    size = min(options.batch_size, len(wanted))
    executor.prepare(torch.empty(size, *executor.image_shape))
    plain, clamped = learner.hooks(None), learner.hooks(options.clamp)
    for _ in range(options.iterations):
        index = torch.randperm(len(wanted), generator=generator)[:size]
        loss = torch.zeros(())
        for weight, hooks in ((1.0, plain), (2.0, clamped)):
            output = executor.run(unit.nodes, unit.source, inputs[index], size, hooks)
            loss = loss + weight * (output - wanted[index]).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _around(gelu: fx.Node) -> list[fx.Node]:
    """The layers before and after a GELU, seen through moves."""
    found = []
    before = gelu.args[0]
    while is_op(before, *MOVES):
        before = before.args[0]  # type: ignore[union-attr]
    if is_op(before, *LAYER_OPS):
        found.append(before)
    todo = list(gelu.users)
    while todo:
        user = todo.pop()
        if is_op(user, *MOVES):
            todo += list(user.users)
        elif is_op(user, *LAYER_OPS):
            found.append(user)
    return found  # type: ignore[return-value]
