"""The quant room's flow: captured graph in, quantised graph out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import Tensor, fx

from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import add_tensor, constant
from deploykit.graph.quantized import FLOAT, LayerPlan, QuantizedModel
from deploykit.quant.cache import TensorCache
from deploykit.quant.calibrate import fit, observe
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.equalize import equalize_layers
from deploykit.quant.insert import insert_quantizers
from deploykit.quant.layer_error import layer_sqnr
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.plan import plan_layers
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.reconstruction.relu import options_for, replace_gelu
from deploykit.quant.state import QuantState
from deploykit.quant.walk import take, walk_units
from deploykit.quant.weights import quantize_weight
from deploykit.types import PassRecord

__all__ = ["QuantizeOptions", "Steps", "quantize"]


class Steps(Protocol):
    """Shows progress: a context with the name of a step and how much there is to do in it."""

    def __call__(
        self, title: str, total: float | None = None
    ) -> AbstractContextManager[Callable[[float], None]]: ...


@contextmanager
def silent(title: str, total: float | None = None):  # type: ignore[no-untyped-def]  # noqa: ARG001
    """No progress."""
    yield lambda _: None


def quantize(
    captured: CapturedModel,
    options: QuantizeOptions,
    batches: Callable[[], Iterable[Tensor]],
    *,
    images: int | None = None,
    steps: Steps = silent,
    cache: TensorCache | None = None,
) -> QuantizedModel:
    """Fold, calibrate, choose ranges, round the weights and insert the quantisers.

    Args:
        captured: left unchanged.
        batches: gives a fresh iterator of calibration batches, float32 (N, 3, S, S), each time.
        images: how many images that is, for the progress.
        steps: shows progress.
        cache: keeps what is done, for a run that goes on after an interruption.
    """
    model = captured.copy()
    graph_module = model.graph_module
    records = _fold_layers(graph_module, options)
    if options.relu_mlp:
        learnt = take(batches(), options.rounding_images)
        with steps("replace GELU by ReLU") as advance:
            relu = options_for(options.weight_bits, options.seed)
            records.append(replace_gelu(graph_module, learnt, relu, advance))
    plans = {
        plan.node: plan
        for plan in plan_layers(
            graph_module,
            options.weight_bits,
            options.input_bits,
            edge_bits=options.edge_bits,
            keep_8bit=options.keep_8bit,
            float_layers=options.float_layers,
            layer_bits=options.layer_bits,
        )
    }
    with steps("calibrate", total=None if images is None else 2 * images) as advance:
        observed = observe(graph_module, plans, options, batches, advance, cache)
    with steps("choose folds and ranges"):
        state, made = fit(graph_module, plans, observed, options)
        records += made
    if options.walks:
        records += walk_units(graph_module, state, options, batches, steps, cache)
    else:
        _round_to_nearest(graph_module, state, options)
    _write_biases(graph_module, state)
    sqnr = layer_sqnr(graph_module, state, next(iter(batches())))
    inserted = insert_quantizers(
        graph_module, plans, state.activations, state.outputs, state.weights
    )
    records.append(
        PassRecord(
            name="quantize",
            summary=(
                f"{inserted.weights} weights, {inserted.activations} activations and "
                f"{inserted.outputs} convolution outputs quantised ({options.bits})"
            ),
            details={
                "biases_int32": inserted.biases,
                "activation_quantizers": inserted.by_kind,
                "kept_wider": {p.layer: p.note for p in plans.values() if p.note},
            },
        )
    )
    return QuantizedModel(
        graph_module=graph_module,
        backbone=captured.backbone,
        bits=options.bits,
        dynamic_batch=captured.dynamic_batch,
        plans=tuple(plans.values()),
        records=tuple(records),
        layer_sqnr_db=sqnr,
    )


def _fold_layers(graph_module: fx.GraphModule, options: QuantizeOptions) -> list[PassRecord]:
    """The folds that need no images."""
    records = []
    folded = fold_batch_norm(graph_module)
    if folded.folded or folded.kept:
        summary = f"{folded.folded} BatchNorm layers folded, {len(folded.kept)} kept"
        records.append(PassRecord(name="fold_batch_norm", summary=summary, details=folded.kept))
    if options.equalize:
        report = equalize_layers(graph_module)
        if report.pairs:
            summary = f"{len(report.pairs)} pairs of layers equalised"
            details = {
                "pairs": [list(pair) for pair in report.pairs],
                "declined": report.declined,
                "largest_factor": report.largest_factor,
            }
            records.append(PassRecord(name="equalize", summary=summary, details=details))
    return records


def _round_to_nearest(
    graph_module: fx.GraphModule, state: QuantState, options: QuantizeOptions
) -> None:
    for node in list(graph_module.graph.nodes):
        plan = state.plans.get(node.name)
        if plan is None or plan.weight_bits in (None, FLOAT):
            continue
        weight = constant(graph_module, node.args[1])
        assert weight is not None and plan.weight_bits is not None
        quantizer = state.input_quantizer(node)
        state.weights[node.name] = quantize_weight(
            weight,
            plan.weight_bits,
            options.weight_range,
            bias=constant(graph_module, node.args[2]) if len(node.args) > 2 else None,
            input_scale=quantizer.scale if isinstance(quantizer, UniformQuantizer) else None,
        )


def _write_biases(graph_module: fx.GraphModule, state: QuantState) -> None:
    """Corrected biases as the graph's own."""
    for node in list(graph_module.graph.nodes):
        if node.name in state.biases:
            plan: LayerPlan = state.plans[node.name]
            bias = add_tensor(graph_module, f"{plan.layer}.bias", state.biases[node.name], node)
            node.args = (*node.args[:2], bias, *node.args[3:])
