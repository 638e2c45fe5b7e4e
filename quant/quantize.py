"""The quant room's flow: captured graph in, quantised graph out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, fx

from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import add_tensor
from deploykit.graph.execute import take
from deploykit.graph.quantized import LayerPlan, QuantizedModel
from deploykit.progress import Steps, silent
from deploykit.quant.cache import TensorCache
from deploykit.quant.calibrate import fit, observe
from deploykit.quant.insert import insert_quantizers
from deploykit.quant.layer_error import layer_sqnr
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.prepare import fold_layers, planned
from deploykit.quant.reconstruction.relu import ReluOptions, replace_gelu
from deploykit.quant.state import QuantState
from deploykit.quant.walk import walk_units
from deploykit.types import PassRecord

__all__ = ["QuantizeOptions", "quantize"]


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
    records = fold_layers(graph_module, options)
    if options.relu_mlp:
        learnt = take(batches(), options.rounding_images)
        with steps("replace GELU by ReLU") as advance:
            relu = ReluOptions.at(options.weight_bits, options.seed)
            records.append(replace_gelu(graph_module, learnt, relu, advance))
    plans = planned(graph_module, options)
    with steps("calibrate", total=None if images is None else 2 * images) as advance:
        observed = observe(graph_module, plans, options, batches, advance, cache)
    with steps("choose folds and ranges"):
        state, made = fit(graph_module, plans, observed, options)
        records += made
    if options.walks:
        records += walk_units(graph_module, state, options, batches, steps, cache)
    else:
        state.round_to_nearest(graph_module, options.weight_range)
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


def _write_biases(graph_module: fx.GraphModule, state: QuantState) -> None:
    """Corrected biases as the graph's own."""
    for node in list(graph_module.graph.nodes):
        if node.name in state.biases:
            plan: LayerPlan = state.plans[node.name]
            bias = add_tensor(graph_module, f"{plan.layer}.bias", state.biases[node.name], node)
            node.args = (*node.args[:2], bias, *node.args[3:])
