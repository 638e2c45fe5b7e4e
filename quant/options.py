"""What the quant room can be asked for, and the presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deploykit.quant.ranges import RangeMethod
from deploykit.quant.reconstruction.unit import LossKind
from deploykit.quant.rounding.layer import Rounding
from deploykit.quant.symmetry import Symmetry

__all__ = ["PRESETS", "NormFold", "Preset", "PresetName", "QuantizeOptions"]

NormFold = Literal["auto", "off", "repq", "repq-median", "repq-clipped", "smooth"]
PresetName = Literal["fast", "balanced", "best"]


@dataclass(frozen=True)
class QuantizeOptions:
    """Widths and choices; the recipe's ``quantize`` section in the quant room's terms.

    Attributes:
        softmax, gelu: a registered quantiser's name, or ``auto``: the least measured error.
        layer_bits: (glob of layer names, ``wNaM`` or ``float``); the first match counts.
        rounding_images: calibration images that rounding and reconstruction read at most.
        reconstruction_iterations: a unit.
        symmetry: which activation grids lie around zero, for runtimes that want it.
        relu_mlp: replace GELU by ReLU and learn the layers around it anew first.
    """

    weight_bits: int
    input_bits: int
    activation_range: RangeMethod = "percentile"
    weight_range: Literal["minmax", "mse"] = "mse"
    norm_fold: NormFold = "auto"
    head_fold: bool = True
    equalize: bool = True
    softmax: str = "auto"
    gelu: str = "auto"
    edge_bits: int = 8
    keep_8bit: tuple[str, ...] = ("first", "last", "depthwise")
    float_layers: tuple[str, ...] = ()
    layer_bits: tuple[tuple[str, str], ...] = ()
    rounding: Rounding = "nearest"
    rounding_images: int = 128
    bias_correction: bool = True
    reconstruction: LossKind | Literal["none"] = "none"
    reconstruction_iterations: int = 300
    relu_mlp: bool = False
    symmetry: Symmetry = "none"
    seed: int = 0

    @property
    def bits(self) -> str:
        return f"w{self.weight_bits}a{self.input_bits}"

    @property
    def walks(self) -> bool:
        """Whether layers are fitted one after the other on what reaches them."""
        return self.rounding != "nearest" or self.bias_correction or self.reconstruction != "none"


@dataclass(frozen=True)
class Preset:
    """How much work goes into accuracy."""

    rounding: Rounding
    rounding_images: int
    reconstruction: LossKind | Literal["none"]
    iterations: int


PRESETS: dict[PresetName, Preset] = {
    "fast": Preset("erq", 32, "none", 0),
    "balanced": Preset("erq", 128, "none", 0),
    "best": Preset("erq", 256, "plain", 300),
}
