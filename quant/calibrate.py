"""From images to quantisers: observe the float graph, fold what pays, fit every tensor's grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from deploykit.graph.edit import is_op
from deploykit.graph.layer_names import MOVES, is_softmax_output
from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.attention_grid import fold_values, value_watches
from deploykit.quant.cache import TensorCache
from deploykit.quant.choose import choose_quantizer
from deploykit.quant.folds.choose import choose_fold, norm_candidates
from deploykit.quant.folds.layers import groups_of
from deploykit.quant.folds.norm import NormGroup, apply_norm_fold, find_norm_groups
from deploykit.quant.insert import OUTPUT_BITS, activation_of, needs_output_quantizer
from deploykit.quant.observers import Histogram, Watch, collect_histograms, sample_rows
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.plan import is_gelu_output
from deploykit.quant.quantizers import get_quantizer
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.query_key_grid import fold_query_keys, query_key_axes, query_key_watches
from deploykit.quant.ranges import error_power
from deploykit.quant.state import QuantState
from deploykit.quant.symmetry import symmetric_keys, symmetric_uniform
from deploykit.types import PassRecord

__all__ = ["Observed", "fit", "observe"]

LOG_FORMS = ("uniform", "log-sqrt2", "adalog")
FEEDBACK_SHARE = 0.4  # of a weight's rounding error that GPTQ leaves (tests/test_rounding.py)


@dataclass(frozen=True)
class Observed:
    """What the images showed of a float graph.

    Attributes:
        histograms: of every tensor a layer reads, and of every foldable norm per channel.
        samples: rows of what each foldable norm and each layer of queries and keys writes, channels
            last, by node name.
    """

    histograms: dict[Watch, Histogram]
    samples: dict[str, Tensor]


def observe(
    graph_module: fx.GraphModule,
    plans: Mapping[str, LayerPlan],
    options: QuantizeOptions,
    batches: Callable[[], Iterable[Tensor]],
    progress: Callable[[int], None] | None = None,
    cache: TensorCache | None = None,
) -> Observed:
    """Run the images twice through the float graph (not at all if the cache has the result).

    Args:
        batches: a fresh iterator of float32 (N, 3, S, S) batches each time.
        progress: called with the number of images done, over both passes.
    """
    nodes = {node.name: node for node in graph_module.graph.nodes}
    groups = foldable(graph_module, plans) if options.norm_fold != "off" else []
    watches = {Watch(source) for source, _ in sources(plans, nodes)}
    watches |= {Watch(activation_of(nodes[name]).name) for name in output_layers(plans, nodes)}
    watches |= {Watch(group.norm.name, group.channel_axis) for group in groups}
    if options.head_fold:
        watches |= value_watches(graph_module, plans) | query_key_watches(graph_module, plans)
    ordered = sorted(watches, key=str)  # the order of a set must not reach the result
    histograms = cache.histograms(ordered) if cache else None
    if histograms is None:
        histograms = collect_histograms(graph_module, ordered, batches, progress)
        if cache:
            cache.keep_histograms(histograms)
    axes = {group.norm.name: group.channel_axis for group in groups}
    if options.head_fold:
        axes |= query_key_axes(graph_module, plans)
    first = next(iter(batches()))
    return Observed(histograms, sample_rows(graph_module, axes, first))


def fit(
    graph_module: fx.GraphModule,
    plans: dict[str, LayerPlan],
    observed: Observed,
    options: QuantizeOptions,
) -> tuple[QuantState, list[PassRecord]]:
    """Fold norms, in place, and fit a quantiser to every tensor a layer reads."""
    nodes = {node.name: node for node in graph_module.graph.nodes}
    activations: dict[tuple[str, int], FittedQuantizer] = {}
    records = []
    histograms = dict(observed.histograms)
    method = options.activation_range
    if options.head_fold:
        records.append(fold_values(graph_module, plans, histograms, method, activations))
        records.append(
            fold_query_keys(graph_module, plans, histograms, observed.samples, method, activations)
        )
    if options.norm_fold != "off":
        records.append(_fold_norms(graph_module, plans, observed, options, activations))
    for source, bits in sources(plans, nodes):
        if (source, bits) not in activations:
            histogram = histograms[Watch(source)]
            kind = _kind(nodes[source], options)
            if kind == "auto":
                # A softmax's errors are summed up; few large activations decide elsewhere.
                summed = is_softmax_output(nodes[source])
                power = 2.0 if summed else error_power(bits, method)
                _, quantizer, _ = choose_quantizer(histogram, bits, LOG_FORMS, method, power)
            else:
                quantizer = get_quantizer(kind).fit(histogram, bits, options.activation_range)
            activations[source, bits] = quantizer
    outputs: dict[str, FittedQuantizer] = {
        name: get_quantizer("uniform").fit(
            histograms[Watch(activation_of(nodes[name]).name)],
            OUTPUT_BITS,
            options.activation_range,
        )
        for name in output_layers(plans, nodes)
    }
    for key in symmetric_keys(options.symmetry, plans, nodes, activations):
        activations[key] = _around_zero(activations[key])
    if options.symmetry == "all":
        outputs = {name: _around_zero(quantizer) for name, quantizer in outputs.items()}
    return QuantState(plans, activations, outputs), records


def _around_zero(quantizer: FittedQuantizer) -> FittedQuantizer:
    if isinstance(quantizer, UniformQuantizer):
        return symmetric_uniform(quantizer)
    return quantizer


def sources(plans: Mapping[str, LayerPlan], nodes: Mapping[str, fx.Node]) -> list[tuple[str, int]]:
    """Every (node, bits) that a quantised layer reads."""
    found = {
        (source.name, plan.input_bits): None
        for name, plan in plans.items()
        if plan.input_bits != FLOAT
        for source in nodes[name].args[: plan.inputs]
        if isinstance(source, fx.Node)
    }
    return list(found)


def output_layers(plans: Mapping[str, LayerPlan], nodes: Mapping[str, fx.Node]) -> list[str]:
    """The convolutions whose results are quantised, because integer kernels write integers."""
    return [
        name
        for name, plan in plans.items()
        if plan.op == "conv2d"
        and FLOAT not in (plan.input_bits, plan.weight_bits)
        and needs_output_quantizer(nodes[name], plans)
    ]


def foldable(graph_module: fx.GraphModule, plans: Mapping[str, LayerPlan]) -> list[NormGroup]:
    """The norms whose readers are all quantised, at one input width, and read it unmixed."""
    return [
        group
        for group in find_norm_groups(graph_module, through_moves=True)
        if _why_not(group, plans) is None
    ]


def _why_not(group: NormGroup, plans: Mapping[str, LayerPlan]) -> str | None:
    if group.declined is not None:
        return group.declined
    if not all(layer.name in plans for layer in group.consumers):
        return "a layer that reads it isn't quantised"
    widths = {plans[layer.name].input_bits for layer in group.consumers}
    if FLOAT in widths or len(widths) > 1:
        return "its readers' inputs have different widths, or none"
    if any(groups_of(layer) != 1 for layer in group.consumers):
        return "a layer with channel groups reads it"
    if not all(_only_moved(source, group.norm) for source in group.inputs):
        return "it is averaged or mixed with others before it is read"
    return None


def _only_moved(node: object, norm: fx.Node) -> bool:
    while node is not norm:
        if not is_op(node, *MOVES):
            return False
        node = node.args[0]  # type: ignore[attr-defined]
    return True


def _kind(node: fx.Node, options: QuantizeOptions) -> str:
    if is_softmax_output(node):
        return options.softmax
    return options.gelu if is_gelu_output(node) else "uniform"


def _fold_norms(
    graph_module: fx.GraphModule,
    plans: Mapping[str, LayerPlan],
    observed: Observed,
    options: QuantizeOptions,
    activations: dict[tuple[str, int], FittedQuantizer],
) -> PassRecord:
    details: dict[str, object] = {}
    declined = {}
    folded = 0
    counts: dict[str, int] = {}
    for group in find_norm_groups(graph_module, through_moves=True):
        reason = _why_not(group, plans)
        if reason is not None:
            declined[group.norm.name] = reason
            continue
        bits = plans[group.consumers[0].name].input_bits
        channels = observed.histograms[Watch(group.norm.name, group.channel_axis)]
        candidates = norm_candidates(
            graph_module, group, channels, bits, options.norm_fold, options.activation_range
        )
        widths = [plans[layer.name].weight_bits or FLOAT for layer in group.consumers]
        (candidate, grid), errors = choose_fold(
            graph_module,
            group,
            candidates,
            observed.samples[group.norm.name],
            widths,
            options.weight_range,
            1.0 if options.rounding == "nearest" else FEEDBACK_SHARE,
        )
        if candidate.name != "off":
            apply_norm_fold(graph_module, group, candidate.ratio, candidate.shift)
            folded += 1
        counts[candidate.name] = counts.get(candidate.name, 0) + 1
        details[group.norm.name] = {name: float(f"{e:.3g}") for name, e in errors.items()}
        for source in group.inputs:
            activations[source.name, bits] = grid
    chosen = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    total = len(details) + len(declined)
    return PassRecord(
        name="fold_norms",
        summary=f"{folded} of {total} norms folded" + (f" ({chosen})" if chosen else ""),
        details={"declined": declined, "relative_error": details},
    )
