"""The quant room's flow: captured graph in, quantised graph out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, fx

from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import constant
from deploykit.graph.quantized import FLOAT, LayerPlan, QuantizedModel
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.norm import NormGroup, find_norm_groups, fold_norm
from deploykit.quant.histogram_file import load_histograms, save_histograms
from deploykit.quant.insert import (
    OUTPUT_BITS,
    activation_of,
    insert_quantizers,
    needs_output_quantizer,
)
from deploykit.quant.layer_error import layer_sqnr
from deploykit.quant.observers import Watch, collect_histograms
from deploykit.quant.plan import is_softmax_output, plan_layers
from deploykit.quant.quantizers import get_quantizer
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.ranges import RangeMethod, activation_range
from deploykit.quant.weights import QuantizedWeight, quantize_weight
from deploykit.types import PassRecord

__all__ = ["QuantizeOptions", "quantize"]

LOG_SOFTMAX_BITS = 4  # above this a uniform grid has the smaller error


@dataclass(frozen=True)
class QuantizeOptions:
    """Widths and choices; the recipe's ``quantize`` section in the quant room's terms."""

    weight_bits: int
    input_bits: int
    activation_range: RangeMethod = "percentile"
    weight_range: Literal["minmax", "mse"] = "mse"
    fold_norms: bool = True
    softmax: Literal["auto", "uniform", "log-sqrt2"] = "auto"
    edge_bits: int = 8
    keep_8bit: tuple[str, ...] = ("first", "last", "depthwise")
    float_layers: tuple[str, ...] = ()

    @property
    def bits(self) -> str:
        return f"w{self.weight_bits}a{self.input_bits}"

    @property
    def softmax_quantizer(self) -> str:
        if self.softmax == "auto":
            return "log-sqrt2" if self.input_bits <= LOG_SOFTMAX_BITS else "uniform"
        return self.softmax


def quantize(
    captured: CapturedModel,
    options: QuantizeOptions,
    batches: Callable[[], Iterable[Tensor]],
    progress: Callable[[int], None] | None = None,
    histogram_cache: tuple[Path, Callable[[Path, bytes], None]] | None = None,
) -> QuantizedModel:
    """Fold, calibrate, choose ranges, round the weights and insert the quantisers.

    Args:
        captured: left unchanged.
        batches: gives a fresh iterator of calibration batches, float32 (N, 3, S, S), each time;
            it is used twice.
        progress: called with the number of images done, over two passes.
        histogram_cache: a file to take the histograms from if it has them, and how to write it.
    """
    model = captured.copy()
    graph_module = model.graph_module
    records: list[PassRecord] = []

    folded = fold_batch_norm(graph_module)
    if folded.folded or folded.kept:
        summary = f"{folded.folded} BatchNorm layers folded, {len(folded.kept)} kept"
        records.append(PassRecord(name="fold_batch_norm", summary=summary, details=folded.kept))

    plans = {
        plan.node: plan
        for plan in plan_layers(
            graph_module,
            options.weight_bits,
            options.input_bits,
            edge_bits=options.edge_bits,
            keep_8bit=options.keep_8bit,
            float_layers=options.float_layers,
        )
    }
    nodes = {node.name: node for node in graph_module.graph.nodes}
    norms = find_norm_groups(graph_module) if options.fold_norms else []
    groups = _foldable_groups(norms, plans)
    output_convs = [
        name
        for name, plan in plans.items()
        if plan.op == "conv2d"
        and plan.input_bits != FLOAT
        and plan.weight_bits != FLOAT
        and needs_output_quantizer(nodes[name], plans)
    ]

    wanted = _wanted(plans, nodes)
    watches = {Watch(source) for source, _ in wanted}
    watches |= {Watch(activation_of(nodes[name]).name) for name in output_convs}
    watches |= {Watch(group.norm.name, group.channel_axis) for group in groups}
    ordered = sorted(watches, key=str)  # the order of a set must not reach the result
    histograms = load_histograms(histogram_cache[0], ordered) if histogram_cache else None
    if histograms is None:
        histograms = collect_histograms(graph_module, ordered, batches, progress)
        if histogram_cache:
            path, write = histogram_cache
            write(path, save_histograms(histograms))

    activations: dict[tuple[str, int], FittedQuantizer] = {}
    spreads = {}
    for group in groups:
        bits = plans[group.consumers[0].name].input_bits
        channels = activation_range(
            histograms[Watch(group.norm.name, group.channel_axis)],
            bits,
            options.activation_range,
            include_zero=False,
        )
        scale, zero_point = fold_norm(graph_module, group, channels, bits)
        activations[group.norm.name, bits] = UniformQuantizer(scale, zero_point, bits)
        spreads[group.norm.name] = float(channels.scale.max() / channels.scale.median())
    if options.fold_norms:
        records.append(_norm_record(norms, groups, spreads))

    for (source, bits), softmax in wanted.items():
        if (source, bits) not in activations:
            kind = options.softmax_quantizer if softmax else "uniform"
            activations[source, bits] = get_quantizer(kind).fit(
                histograms[Watch(source)], bits, options.activation_range
            )
    outputs = {
        name: get_quantizer("uniform").fit(
            histograms[Watch(activation_of(nodes[name]).name)],
            OUTPUT_BITS,
            options.activation_range,
        )
        for name in output_convs
    }
    weights = _quantize_weights(graph_module, plans, activations, options)
    first_batch = next(iter(batches()))
    sqnr = layer_sqnr(graph_module, plans, activations, weights, first_batch)

    inserted = insert_quantizers(graph_module, plans, activations, outputs, weights)
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


def _wanted(
    plans: Mapping[str, LayerPlan], nodes: Mapping[str, fx.Node]
) -> dict[tuple[str, int], bool]:
    """Every (source node, bits) a layer reads, and whether it is a softmax output."""
    wanted: dict[tuple[str, int], bool] = {}
    for name, plan in plans.items():
        if plan.input_bits == FLOAT:
            continue
        for source in nodes[name].args[: plan.inputs]:
            assert isinstance(source, fx.Node)
            wanted[source.name, plan.input_bits] = plan.op == "matmul" and is_softmax_output(source)
    return wanted


def _foldable_groups(norms: list[NormGroup], plans: Mapping[str, LayerPlan]) -> list[NormGroup]:
    groups = []
    for group in norms:
        widths = {plans[c.name].input_bits for c in group.consumers if c.name in plans}
        all_planned = all(c.name in plans for c in group.consumers)
        if group.declined is None and all_planned and len(widths) == 1 and FLOAT not in widths:
            groups.append(group)
    return groups


def _norm_record(
    norms: list[NormGroup], groups: list[NormGroup], spreads: dict[str, float]
) -> PassRecord:
    declined = {g.norm.name: g.declined for g in norms if g.declined is not None}
    return PassRecord(
        name="fold_norms",
        summary=f"{len(groups)} of {len(norms)} norms folded (RepQ)",
        details={"declined": declined, "largest_to_median_channel_scale": spreads},
    )


def _quantize_weights(
    graph_module: fx.GraphModule,
    plans: Mapping[str, LayerPlan],
    activations: Mapping[tuple[str, int], FittedQuantizer],
    options: QuantizeOptions,
) -> dict[str, QuantizedWeight]:
    weights = {}
    nodes = {node.name: node for node in graph_module.graph.nodes}
    for name, plan in plans.items():
        if plan.weight_bits in (None, FLOAT):
            continue
        node = nodes[name]
        weight = constant(graph_module, node.args[1])
        assert weight is not None and plan.weight_bits is not None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        fitted = activations.get((source.name, plan.input_bits))
        weights[name] = quantize_weight(
            weight,
            plan.weight_bits,
            options.weight_range,
            bias=constant(graph_module, node.args[2]) if len(node.args) > 2 else None,
            input_scale=fitted.scale if isinstance(fitted, UniformQuantizer) else None,
        )
    return weights
