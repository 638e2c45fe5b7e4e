"""Which preset fits into a time budget, from how fast the model runs here."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from deploykit.graph.capture import CapturedModel
from deploykit.quant.options import PRESETS, Preset, PresetName
from deploykit.quant.reconstruction.unit import ReconstructionOptions

__all__ = ["DEFAULT_BUDGET_S", "PresetChoice", "choose_preset", "estimate_seconds",
           "seconds_per_image"]  # fmt: skip

DEFAULT_BUDGET_S = 300.0

# Work in forward passes of the float model (benchmarks/growth.py shows the seconds): two
# calibration passes with their histograms; each layer's inputs, wanted outputs and second
# moments; a training step of every unit.
_OBSERVE = 4.0
_ROUND = 22.0
_LEARN = 6.0


@dataclass(frozen=True)
class PresetChoice:
    """A preset, and why.

    Attributes:
        seconds: the estimate for every preset.
    """

    name: PresetName
    reason: str
    seconds: dict[PresetName, float]


@torch.no_grad()
def seconds_per_image(captured: CapturedModel, batch: Tensor) -> float:
    """Seconds the float graph takes for one image of a batch (N, 3, S, S), after a warm-up."""
    part = batch[:4]
    captured.graph_module(part)
    started = time.perf_counter()
    captured.graph_module(part)
    return (time.perf_counter() - started) / len(part)


def estimate_seconds(preset: Preset, forward: float, images: int) -> float:
    """About how long quantising takes.

    Args:
        forward: seconds of one image through the float model.
        images: calibration images.
    """
    learn = preset.iterations * ReconstructionOptions().batch_size * _LEARN
    return forward * (images * _OBSERVE + min(images, preset.rounding_images) * _ROUND + learn)


def choose_preset(
    weight_bits: int, input_bits: int, forward: float, images: int, budget: float
) -> PresetChoice:
    """The most thorough preset that should take no longer than ``budget`` seconds."""
    seconds = {name: estimate_seconds(p, forward, images) for name, p in PRESETS.items()}
    if min(weight_bits, input_bits) >= 8:
        return PresetChoice("fast", "8 bits lose next to nothing without more work", seconds)
    fitting = [name for name in PRESETS if seconds[name] <= budget]
    name = fitting[-1] if fitting else "fast"
    reason = f"about {seconds[name]:.0f} s, of a budget of {budget:g} s"
    return PresetChoice(name, reason, seconds)
