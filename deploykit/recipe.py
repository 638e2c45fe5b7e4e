"""The recipe: everything the command line can say, as validated data.

A recipe file is YAML with these sections; every key has a default except ``model.name``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from deploykit.types import Preprocessing

__all__ = [
    "Bits",
    "CalibrationSection",
    "EvaluationSection",
    "GatesSection",
    "MeasureSection",
    "ModelSection",
    "PruneSection",
    "QuantizeSection",
    "Recipe",
    "VerifySection",
    "parse_bits",
]


RECIPE_VERSION = 1
"""Of the format; a recipe of another version is refused."""


class Bits(NamedTuple):
    """Weight and activation width in bits; 16 means left in float."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"w{self.weights}a{self.activations}"


_BITS = re.compile(r"^w(\d+)a(\d+)$")
_WEIGHT_BITS = (2, 3, 4, 5, 6, 7, 8)
_ACTIVATION_BITS = (3, 4, 5, 6, 7, 8, 16)


def parse_bits(value: object) -> str:
    """Canonical spelling of a bit width: ``4`` and ``"4"`` mean ``w4a4``.

    Raises:
        ValueError: the text is not ``N`` or ``wNaM``, or a width is out of range.
    """
    text = str(value).strip().lower()
    if text.isdigit():
        text = f"w{int(text)}a{int(text)}"
    match = _BITS.match(text)
    if match is None:
        message = f"bits must be a width such as 4 or a pair such as w4a8, got {value!r}"
        raise ValueError(message)
    weights, activations = int(match[1]), int(match[2])
    if weights not in _WEIGHT_BITS or activations not in _ACTIVATION_BITS:
        message = (
            f"bits {value!r}: weights take {_WEIGHT_BITS[0]} to {_WEIGHT_BITS[-1]} bits, "
            f"activations 3 to 8, or 16 for float"
        )
        raise ValueError(message)
    return f"w{weights}a{activations}"


def _split_bits(text: str) -> Bits:
    match = _BITS.match(text)
    assert match is not None  # parse_bits ran before
    return Bits(int(match[1]), int(match[2]))


def _expand(path: Path) -> Path:
    return path.expanduser()


UserPath = Annotated[Path, AfterValidator(_expand)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSection(Section):
    """Which backbone, and where its weights come from."""

    name: str = Field(min_length=1, max_length=500)
    weights: str = Field(
        default="auto",
        description="auto (hub, then DEPLOYKIT_WEIGHTS), hub, random, or a checkpoint file",
    )
    num_classes: int | None = Field(default=None, gt=0, le=100_000)
    img_size: int | None = Field(default=None, gt=0, le=4096)
    preprocessing: Preprocessing | None = None


class CalibrationSection(Section):
    """Images the ranges are read from. Without data, synthetic images are used and said to be."""

    data: UserPath | None = None
    images: int = Field(default=128, gt=0)
    batch_size: int = Field(default=16, gt=0)


class EvaluationSection(Section):
    """Labelled images for the accuracy of original and artefact."""

    data: UserPath | None = None
    images: int | None = Field(default=None, gt=0, description="None: all of them")
    batch_size: int = Field(default=32, gt=0)
    simulation: bool = Field(default=False, description="also run the simulation on all images")


class PruneSection(Section):
    """Changes of the module before it is captured."""

    sparsity: Literal["none", "2:4"] = "none"


class QuantizeSection(Section):
    """Widths, ranges, folds."""

    bits: Annotated[str, BeforeValidator(parse_bits)] = "w8a8"
    activation_range: Literal["minmax", "percentile", "percentile-mse"] = "percentile"
    weight_range: Literal["minmax", "mse"] = "mse"
    fold_norms: bool = Field(default=True, description="RepQ fold of LayerNorm and GroupNorm")
    softmax: Literal["auto", "uniform", "log-sqrt2"] = Field(
        default="auto", description="auto: log-sqrt2 at 4 bits and below, uniform above"
    )
    edge_bits: int = Field(
        default=8,
        ge=3,
        le=8,
        description="width of the first layer's input, and of the layers in keep_8bit",
    )
    keep_8bit: list[Literal["first", "last", "depthwise"]] = Field(
        default=["first", "last", "depthwise"],
        description="layers whose weights and inputs keep edge_bits when bits is narrower",
    )
    float_layers: list[str] = Field(default=[], description="layer names (globs) left in float")

    @property
    def widths(self) -> Bits:
        return _split_bits(self.bits)


class VerifySection(Section):
    """Parity of the artefact with the quantised graph."""

    images: int = Field(default=32, gt=1)
    batch_sizes: tuple[int, int] = (1, 8)

    @model_validator(mode="after")
    def _two_sizes(self) -> VerifySection:
        if self.batch_sizes[0] == self.batch_sizes[1]:
            message = f"batch_sizes must be two different sizes, got {list(self.batch_sizes)}"
            raise ValueError(message)
        if min(self.batch_sizes) < 1:
            message = f"batch_sizes must be positive, got {list(self.batch_sizes)}"
            raise ValueError(message)
        return self


class MeasureSection(Section):
    """Latency: protocol parameters."""

    batch_size: int = Field(default=1, gt=0)
    threads: int = Field(default=1, gt=0)
    min_samples: int = Field(default=64, ge=16)
    min_seconds: float = Field(default=3.0, gt=0)
    max_seconds: float = Field(default=30.0, gt=0)
    warmup_seconds: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _order(self) -> MeasureSection:
        if self.max_seconds < self.min_seconds:
            message = f"max_seconds {self.max_seconds:g} is below min_seconds {self.min_seconds:g}"
            raise ValueError(message)
        return self


class GatesSection(Section):
    """Limits that make the run fail."""

    max_drop: float | None = Field(default=None, ge=0, description="percentage points")
    max_latency_ms: float | None = Field(default=None, gt=0)


class Recipe(Section):
    """One run, complete."""

    version: Literal[1] = 1
    model: ModelSection
    prune: PruneSection = PruneSection()
    quantize: QuantizeSection = QuantizeSection()
    calibration: CalibrationSection = CalibrationSection()
    evaluation: EvaluationSection = EvaluationSection()
    verify: VerifySection = VerifySection()
    targets: list[str] = Field(default=["cpu-onnxruntime"], min_length=1)
    measure: MeasureSection = MeasureSection()
    gates: GatesSection = GatesSection()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.gates.max_drop is not None and self.model.weights == "random":
            message = "gates.max_drop needs trained weights, but model.weights is random"
            raise ValueError(message)
        if self.gates.max_drop is not None and self.evaluation.data is None:
            message = "gates.max_drop needs labelled images: give evaluation.data (--data DIR)"
            raise ValueError(message)
        return self
