"""A recipe's quantize section in the quant room's terms."""

from __future__ import annotations

from deploykit.quant.options import PRESETS, PresetName, QuantizeOptions
from deploykit.recipe import QuantizeSection

__all__ = ["quantize_options"]


def quantize_options(
    section: QuantizeSection, seed: int = 0, preset: PresetName | None = None
) -> QuantizeOptions:
    """The recipe's quantize section in the quant room's terms.

    Args:
        preset: decides what the section leaves open, unless the section names another.
    """
    widths = section.widths
    name = section.preset or preset or "fast"
    chosen = PRESETS[name]
    # Eight bits to the nearest code lose nothing but the mean, which the bias takes.
    plain = name == "fast" and widths.weights >= 8
    rounding = section.rounding or ("nearest" if plain else chosen.rounding)
    return QuantizeOptions(
        weight_bits=widths.weights,
        input_bits=widths.activations,
        activation_range=section.activation_range,
        weight_range=section.weight_range,
        norm_fold=section.norm_fold,
        head_fold=section.head_fold,
        equalize=section.equalize,
        softmax=section.softmax,
        gelu=section.gelu,
        edge_bits=section.edge_bits,
        keep_8bit=tuple(section.keep_8bit),
        float_layers=tuple(section.float_layers),
        layer_bits=tuple(section.layer_bits.items()),
        rounding=rounding,
        rounding_images=section.rounding_images or chosen.rounding_images,
        bias_correction=section.bias_correction,
        reconstruction=section.reconstruction or chosen.reconstruction,
        reconstruction_iterations=section.reconstruction_iterations
        or chosen.iterations
        or PRESETS["best"].iterations,
        relu_mlp=section.relu_mlp,
        seed=seed,
    )
