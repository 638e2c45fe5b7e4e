"""The float graph made ready for scoring at one pair of widths, from one calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import Tensor, fx

from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import LayerPlan
from deploykit.quant.calibrate import Observed, fit, foldable, observe
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.prepare import fold_layers, planned
from deploykit.quant.state import QuantState

__all__ = ["Calibrated", "Prepared", "calibrate", "plans_at", "prepare"]


@dataclass(frozen=True)
class Calibrated:
    """A captured graph after the folds that need no images, and what the images showed of it.

    Attributes:
        ties: node names of layers that read one norm, which can be folded only at one width.
    """

    captured: CapturedModel
    observed: Observed
    ties: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Prepared:
    """A graph that computes the float model, and what each layer becomes when it is quantised."""

    graph_module: fx.GraphModule
    state: QuantState


def plans_at(
    graph_module: fx.GraphModule, options: QuantizeOptions, weight_bits: int, input_bits: int
) -> dict[str, LayerPlan]:
    """Every layer's plan in a model of these widths throughout, by node name."""
    at = replace(options, weight_bits=weight_bits, input_bits=input_bits, layer_bits=())
    return planned(graph_module, at)


def calibrate(
    captured: CapturedModel,
    options: QuantizeOptions,
    batches: Callable[[], Iterable[Tensor]],
    progress: Callable[[int], None] | None = None,
) -> Calibrated:
    """Observe a copy at 8 bits throughout, where every tensor and norm is watched that any
    narrower model needs.

    Args:
        batches: a fresh iterator of float32 (N, 3, S, S) batches each time; used twice.
        progress: called with the number of images done, over both passes.
    """
    model = captured.copy()
    fold_layers(model.graph_module, options)
    plans = plans_at(model.graph_module, options, 8, 8)
    groups = foldable(model.graph_module, plans) if options.norm_fold != "off" else []
    return Calibrated(
        model,
        observe(model.graph_module, plans, options, batches, progress),
        tuple(tuple(layer.name for layer in group.consumers) for group in groups),
    )


def prepare(
    calibrated: Calibrated, options: QuantizeOptions, weight_bits: int, input_bits: int
) -> Prepared:
    """Fold the norms for these widths, fit the quantisers and round the weights to nearest.

    Works on a copy, so memory holds the model twice (and its codes) while it is in use.

    Args:
        weight_bits, input_bits: 2 to 8, or FLOAT.
    """
    graph_module = calibrated.captured.copy().graph_module
    plans = plans_at(graph_module, options, weight_bits, input_bits)
    options = replace(options, weight_bits=weight_bits, input_bits=input_bits, layer_bits=())
    state, _ = fit(graph_module, plans, calibrated.observed, options)
    state.round_to_nearest(graph_module, options.weight_range)
    return Prepared(graph_module, state)
