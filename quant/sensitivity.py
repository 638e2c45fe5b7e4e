"""Sensitivity: the score of every layer at every width, each quantised alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import constant
from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.sensitivity_scores import Metric, Tally, score_layers
from deploykit.quant.sensitivity_setup import Calibrated, calibrate, plans_at, prepare

__all__ = ["FLOAT_BITS", "LayerScores", "Metric", "Widths", "measure_sensitivity"]

FLOAT_BITS = "float"

Widths = tuple[int, int]
"""Of weights and activations; FLOAT for float."""


@dataclass
class LayerScores:
    """One layer or attention matmul, at every width it may take.

    Attributes:
        layer: name of its plan (``LayerPlan.layer``); its nodes are quantised together.
        op: ``conv2d``, ``linear`` or ``matmul``.
        nodes: in the captured graph.
        group: layers of one group read one foldable norm and should share their width.
        weights: number of weights, 0 for a matmul.
        channels: output channels that have a weight scale each.
        scores: by bits (``w4a8`` or ``float``), widest first; lower is better, 0 is no loss.
        sqnr_db: of the layer's own output, by bits.
        takes: the bits it really gets in a model of each candidate's bits throughout.
    """

    layer: str
    op: str
    nodes: tuple[str, ...]
    group: str
    weights: int
    channels: int
    scores: dict[str, float] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    takes: dict[str, str] = field(default_factory=dict)


def measure_sensitivity(
    captured: CapturedModel,
    options: QuantizeOptions,
    candidates: Sequence[Widths],
    batches: Callable[[], Iterable[Tensor]],
    metric: Metric = "kl",
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[LayerScores]:
    """Score every layer of a captured graph at every candidate's widths.

    A score is additive over layers: nats of KL divergence for ``kl`` and ``fisher``; noise over
    signal of the layer's own output for ``sqnr``; and for ``lrp``, whose relevance says nothing
    of widths, the layer's share of all relevance times that same noise over signal. It is a
    simulation of single layers: 8-bit outputs of convolutions are left out.

    Layers that the plan keeps wider (``keep_8bit``, the image, ``float_layers``) are scored at
    the widths they really get, so not every layer has every candidate.

    Args:
        captured: left unchanged.
        options: folds, ranges, grids and layers kept wider, as ``quantize`` has them. Its widths
            don't count, nor do rounding, bias correction and reconstruction: they mend part of
            what is measured here.
        candidates: (weight bits, activation bits), widest first.
        batches: a fresh iterator of float32 (N, 3, S, S) batches each time; used twice for
            calibration and once for each candidate.
        progress: called with the number of images done, over ``2 + len(candidates)`` passes.

    Returns:
        Layers in graph order.

    Raises:
        DeploykitError: the float model's logits aren't finite.
    """
    calibrated = calibrate(captured, options, batches, progress)
    layers = _layers(calibrated, options)
    relevance: dict[str, float] = {}
    for weight_bits, input_bits in candidates:
        prepared = prepare(calibrated, options, weight_bits, input_bits)
        wanted: dict[str, tuple[str, ...]] = {}
        asked = FLOAT_BITS if weight_bits == input_bits == FLOAT else f"w{weight_bits}a{input_bits}"
        for layer in layers:
            bits = layer.takes[asked] = _bits_of(prepared.state.plans[layer.nodes[0]])
            if bits == FLOAT_BITS:
                layer.scores[bits], layer.sqnr_db[bits] = 0.0, float("inf")
            elif bits not in layer.scores:
                wanted[layer.layer] = layer.nodes
        tallies: Mapping[str, Tally] = {}
        if wanted:
            tallies = score_layers(prepared, wanted, _counted(batches, progress), metric, seed=seed)
        for layer in layers:
            if layer.layer in tallies:
                tally = tallies[layer.layer]
                bits = _bits_of(prepared.state.plans[layer.nodes[0]])
                layer.sqnr_db[bits] = tally.sqnr_db
                layer.scores[bits] = (
                    tally.loss / tally.images if metric in ("kl", "fisher") else tally.noise_ratio
                )
                # The relevance is the float model's: the same at every width.
                relevance.setdefault(layer.layer, tally.relevance)
    if metric == "lrp":
        total = sum(relevance.values()) or 1.0
        for layer in layers:
            share = relevance.get(layer.layer, 0.0) / total
            layer.scores = {bits: share * ratio for bits, ratio in layer.scores.items()}
    return layers


def _counted(
    batches: Callable[[], Iterable[Tensor]], progress: Callable[[int], None] | None
) -> Iterable[Tensor]:
    for batch in batches():
        yield batch
        if progress is not None:
            progress(len(batch))


def _bits_of(plan: LayerPlan) -> str:
    return FLOAT_BITS if plan.is_float else plan.bits


def _layers(calibrated: Calibrated, options: QuantizeOptions) -> list[LayerScores]:
    """Every layer that may be quantised. Nodes of one name are one layer: a module called twice."""
    graph_module = calibrated.captured.graph_module
    nodes = {node.name: node for node in graph_module.graph.nodes}
    members: dict[str, list[LayerPlan]] = {}
    for plan in plans_at(graph_module, options, 8, 8).values():
        if not plan.is_float:
            members.setdefault(plan.layer, []).append(plan)
    ties = {name: tied[0] for tied in calibrated.ties for name in tied}
    found = []
    for layer, plans in members.items():
        weights = _weights(graph_module, [nodes[plan.node] for plan in plans])
        found.append(
            LayerScores(
                layer=layer,
                op=plans[0].op,
                nodes=tuple(plan.node for plan in plans),
                group=next((ties[p.node] for p in plans if p.node in ties), layer),
                weights=sum(weight.numel() for weight in weights),
                channels=sum(len(weight) for weight in weights),
            )
        )
    return found


def _weights(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> list[Tensor]:
    """The weights of some layers, a shared one once."""
    shared: dict[str, Tensor] = {}
    for node in nodes:
        weight = constant(graph_module, node.args[1])
        if weight is not None:
            shared[str(node.args[1])] = weight
    return list(shared.values())
