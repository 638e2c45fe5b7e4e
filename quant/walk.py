"""Unit by unit through the network: round, reconstruct, go on with what really comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from deploykit.graph.execute import Executor, Hook, take
from deploykit.graph.levels import has_levels
from deploykit.graph.units import Unit, split_units
from deploykit.progress import Steps
from deploykit.quant.cache import TensorCache
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.reconstruction.losses import (
    FisherLoss,
    OutputLoss,
    PlainLoss,
    WeightedLoss,
    importance,
    output_gradient,
    perturbation_hessian,
)
from deploykit.quant.reconstruction.unit import ReconstructionOptions, reconstruct_unit
from deploykit.quant.rounding.layer import RoundingOptions, UnitData, round_unit
from deploykit.quant.state import QuantState
from deploykit.quant.weights import QuantizedWeight
from deploykit.types import PassRecord

__all__ = ["walk_units"]

FISHER_RANK = {2: 15, 3: 15}  # by weight bits; FIMA-Q's values
FISHER_RANK_ELSE = 5


def walk_units(
    graph_module: fx.GraphModule,
    state: QuantState,
    options: QuantizeOptions,
    batches: Callable[[], Iterable[Tensor]],
    steps: Steps,
    cache: TensorCache | None,
) -> list[PassRecord]:
    """Choose every weight's codes and every bias, in the order the layers run, into ``state``.

    Memory: the inputs of one unit for all ``rounding_images``, twice (three times while it is
    reconstructed), ``rounding.layer.LIVE_BYTES`` of what is between two of its layers, a layer's
    second moments, and a batch's activations.
    """
    executor = Executor(graph_module)
    units = split_units(graph_module.graph, state.plans)
    images = take(batches(), options.rounding_images)
    for batch in images:
        executor.prepare(batch)
    counts = [len(batch) for batch in images]
    data = UnitData(images, images, counts)
    rounding = RoundingOptions(options.rounding, options.weight_range, options.bias_correction)
    learner = None
    if options.reconstruction != "none":
        learner = _Learner(executor, units, options, images)
    per_unit = learner.options.iterations if learner else 0
    hooks = state.hooks(graph_module.graph)
    title = "reconstruct" if learner else f"round ({options.rounding})"
    total = sum(len(unit.layers) for unit in units) + per_unit * len(units)
    with steps(title, total=total) as advance:
        for index, unit in enumerate(units):
            name = f"unit-{index:03d}"
            kept = cache.tensors(name) if cache else None
            if kept is not None:
                _restore(state, unit, kept)
                outputs = None
            else:
                outputs = round_unit(executor, state, unit, data, rounding, hooks)
                advance(len(unit.layers))
                if learner:
                    learner.learn(index, state, data, outputs.floats, advance)
                if cache:
                    cache.keep(name, _kept(state, unit))
            data = _next(executor, unit, data, outputs, hooks, learnt=learner is not None)
            if kept is not None:
                advance(len(unit.layers) + per_unit)
    summary = f"{len(state.weights)} weights rounded by {options.rounding} on {sum(counts)} images"
    if learner:
        summary += f"; {len(units)} units reconstructed, {learner.kind} loss, {per_unit} steps each"
    details = {"units": [unit.name for unit in units], "biases_corrected": len(state.biases)}
    return [PassRecord(name="round", summary=summary, details=details)]


def _next(
    executor: Executor,
    unit: Unit,
    data: UnitData,
    outputs: UnitData | None,
    hooks: Mapping[str, Hook],
    *,
    learnt: bool,
) -> UnitData:
    """The next unit's inputs: this one's outputs, run again if it changed since, or never ran."""
    floats = outputs.floats if outputs else executor.outputs(unit, data.floats, data.counts)
    if outputs is not None and not learnt:
        return outputs
    quantized = executor.outputs(unit, data.quantized, data.counts, hooks)
    return UnitData(floats, quantized, data.counts)


class _Learner:
    """Reconstruction of one unit after the other, by the loss that was asked for."""

    def __init__(
        self,
        executor: Executor,
        units: Sequence[Unit],
        options: QuantizeOptions,
        images: Sequence[Tensor],
    ) -> None:
        self.executor, self.units = executor, units
        self.kind, self.weight_bits = options.reconstruction, options.weight_bits
        if has_levels(executor.graph_module.graph):
            self.kind = "plain"  # the others weigh errors by what they do to the classes
        largest = max(len(batch) for batch in images)
        self.options = ReconstructionOptions(
            iterations=options.reconstruction_iterations,
            batch_size=min(ReconstructionOptions.batch_size, largest),  # a model may fix its batch
            seed=options.seed,
        )
        self.logits = self._logits(images) if self.kind in ("aphq", "fima") else []

    @torch.no_grad()
    def _logits(self, images: Sequence[Tensor]) -> list[Tensor]:
        run, nodes = self.executor.run, self.executor.activations
        return [run(nodes, self.executor.image, batch, len(batch)) for batch in images]

    def learn(
        self,
        index: int,
        state: QuantState,
        data: UnitData,
        outputs: Sequence[Tensor],
        advance: Callable[[float], None],
    ) -> None:
        """Reconstruct a unit towards the float model's ``outputs``, into ``state``."""
        loss = self._loss(index, outputs)
        reconstruct_unit(
            self.executor, state, self.units[index], data, outputs, loss, self.options, advance
        )

    def _loss(self, index: int, outputs: Sequence[Tensor]) -> OutputLoss:
        unit, executor = self.units[index], self.executor
        rest = [node for later in self.units[index + 1 :] for node in later.nodes]
        if self.kind == "plain" or not rest:
            return PlainLoss()

        def suffix(output: Tensor) -> Tensor:
            executor.prepare(torch.empty(len(output), *executor.image_shape))
            result: Tensor = executor.run(rest, unit.output, output, len(output))
            return result

        if self.kind == "aphq":
            total = sum(
                perturbation_hessian(suffix, output, wanted) * len(output)
                for output, wanted in zip(outputs, self.logits, strict=True)
            )
            assert isinstance(total, Tensor)
            return WeightedLoss(importance(total / sum(len(output) for output in outputs)))

        def gradient(output: Tensor, wanted: Tensor) -> Tensor:
            with torch.no_grad():
                goal = suffix(wanted)
            return output_gradient(suffix, output, goal).abs().mean(0)

        rank = FISHER_RANK.get(self.weight_bits, FISHER_RANK_ELSE)
        return FisherLoss(gradient, rank, max(self.options.iterations // rank, 1))


def _kept(state: QuantState, unit: Unit) -> dict[str, Tensor]:
    """A finished unit's decisions as tensors."""
    tensors = {}
    for name in unit.layers:
        if name in state.weights:
            tensors[f"codes|{name}"] = state.weights[name].codes
            tensors[f"scale|{name}"] = state.weights[name].scale
        if name in state.biases:
            tensors[f"bias|{name}"] = state.biases[name]
    for key in _keys(state, unit):
        quantizer = state.activations[key]
        if isinstance(quantizer, UniformQuantizer):
            scale = torch.tensor(quantizer.scale, dtype=torch.float64)
            tensors[f"activation|{key[0]}|{key[1]}"] = scale
    return tensors


def _restore(state: QuantState, unit: Unit, tensors: dict[str, Tensor]) -> None:
    for name in unit.layers:
        bits = state.plans[name].weight_bits
        if f"codes|{name}" in tensors and bits is not None:
            state.weights[name] = QuantizedWeight(
                tensors[f"codes|{name}"], tensors[f"scale|{name}"], bits
            )
        if f"bias|{name}" in tensors:
            state.biases[name] = tensors[f"bias|{name}"]
    for key in _keys(state, unit):
        quantizer = state.activations[key]
        scale = tensors.get(f"activation|{key[0]}|{key[1]}")
        if scale is not None and isinstance(quantizer, UniformQuantizer):
            state.activations[key] = replace(quantizer, scale=float(scale))


def _keys(state: QuantState, unit: Unit) -> list[tuple[str, int]]:
    nodes = {node.name: node for node in unit.nodes}
    keys = [key for name in unit.layers for key in state.input_keys(nodes[name])]
    return list(dict.fromkeys(keys))
