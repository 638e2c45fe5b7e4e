"""The recipe: everything the command line can say, as validated data.

A recipe file is YAML with these sections; every key has a default except ``model.name``.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from deploykit._recipe_section import Section, UserPath
from deploykit.recipe_features import features_conflict
from deploykit.recipe_prune import (
    MergeSection,
    PruneSection,
    RecoverSection,
    SparsifySection,
)
from deploykit.types import Preprocessing

__all__ = [
    "NNCF_BITS",
    "Bits",
    "CalibrationSection",
    "EvaluationSection",
    "ExportSection",
    "GatesSection",
    "MeasureSection",
    "ModelSection",
    "QuantizeSection",
    "Recipe",
    "VerifySection",
    "parse_bits",
    "parse_layer_bits",
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


def parse_layer_bits(value: object) -> str:
    """``float``, or what ``parse_bits`` makes of the value.

    Raises:
        ValueError: the text is neither.
    """
    text = str(value).strip().lower()
    if text == "float":
        return text
    try:
        return parse_bits(value)
    except ValueError as error:
        message = f"{error}; or float"
        raise ValueError(message) from error


def _split_bits(text: str) -> Bits:
    match = _BITS.match(text)
    assert match is not None  # parse_bits ran before
    return Bits(int(match[1]), int(match[2]))


BitsText = Annotated[str, BeforeValidator(parse_bits)]
LayerBitsText = Annotated[str, BeforeValidator(parse_layer_bits)]

Algorithm = Literal["deploykit", "nncf", "none"]
Grid = Literal["auto", "uniform", "log2", "log-sqrt2", "sulq", "adalog", "twin-uniform"]

NNCF_BITS = ("w8a8", "w8a16", "w4a16")
"""What NNCF's ONNX backend quantises to; it knows no 4-bit or 6-bit activations."""


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
    insert: str | None = Field(
        default=None, description="new layers in the network: ela_b, ulsam, gmm, e2gc_16 …"
    )
    classes: list[int] | None = Field(
        default=None, min_length=1, description="only these classes of the head, in this order"
    )
    features: bool | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(
        default=False,
        description="feature maps instead of scores: true for the deepest of each resolution, "
        "or which of the network's maps, by number",
    )

    @property
    def gives_features(self) -> bool:
        """The outputs are feature maps, and there are no classes."""
        return self.features is not False


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
    research_integer_ops: Literal[8, 16] | None = Field(
        default=None,
        description="also simulate I-ViT's integer softmax, GELU and LayerNorm at so many bits",
    )


class QuantizeSection(Section):
    """Who quantises, to which widths, and how."""

    bits: BitsText = "w8a8"
    algorithm: Algorithm = Field(
        default="deploykit",
        description="nncf: NNCF's own quantisation makes the file that ships; none: it stays float",
    )
    compare: list[Literal["nncf"]] = Field(
        default=[], description="others that quantise the same model, for rows of the same report"
    )
    preset: Literal["fast", "balanced", "best"] | None = Field(
        default=None,
        description="how much work goes into accuracy; None: what fits into time_budget_s",
    )
    time_budget_s: float | None = Field(
        default=None,
        gt=0,
        description="seconds quantising should take at most, by estimate; None: 300",
    )
    activation_range: Literal["minmax", "percentile", "percentile-mse", "progressive"] = (
        "percentile"
    )
    weight_range: Literal["minmax", "mse"] = "mse"
    rounding: Literal["nearest", "gptq", "erq"] | None = Field(
        default=None, description="of the weights; None: what the preset says"
    )
    rounding_images: int | None = Field(
        default=None,
        gt=0,
        description="calibration images that rounding reads at most; None: what the preset says",
    )
    reconstruction: Literal["none", "plain", "aphq", "fima"] | None = Field(
        default=None, description="block by block; None: what the preset says"
    )
    reconstruction_iterations: int | None = Field(
        default=None, gt=0, description="steps a block; None: what the preset says"
    )
    relu_mlp: bool = Field(
        default=False, description="replace GELU by ReLU and learn the layers around it anew"
    )
    norm_fold: Literal["auto", "off", "repq", "repq-median", "repq-clipped", "smooth"] = Field(
        default="auto",
        description="of LayerNorm and GroupNorm: RepQ's, variants of it, SmoothQuant's",
    )
    equalize: bool = Field(default=True, description="cross-layer equalisation of weights")
    bias_correction: bool = Field(default=True, description="mean output error into the bias")
    head_fold: bool = Field(
        default=True, description="one range for queries, keys and values, by rewriting weights"
    )
    softmax: Grid = Field(
        default="auto", description="auto: log-sqrt2 at 4 bits and below, uniform above"
    )
    gelu: Grid = Field(
        default="auto",
        description="grid of the values behind a GELU; auto: the least measured error",
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
    layer_bits: dict[str, LayerBitsText] = Field(
        default={}, description="layer names (globs) with widths of their own: wNaM, or float"
    )
    float_layers: list[str] = Field(default=[], description="layer names (globs) left in float")
    optimize_for: str | None = Field(
        default=None,
        description="a target: layers that are slower there quantised than in float stay in float",
    )
    optimize_rounds: int = Field(
        default=4, ge=1, le=20, description="placements tried at most for optimize_for"
    )

    @property
    def widths(self) -> Bits:
        return _split_bits(self.bits)

    @property
    def uses_nncf(self) -> bool:
        """NNCF makes a file of this run."""
        return self.algorithm == "nncf" or "nncf" in self.compare

    @model_validator(mode="after")
    def _nncf_can(self) -> QuantizeSection:
        if self.algorithm in self.compare or len(set(self.compare)) < len(self.compare):
            message = f"quantize.compare names {self.compare[-1]} twice; leave it out"
            raise ValueError(message)
        if self.uses_nncf and self.bits not in NNCF_BITS:
            *most, last = NNCF_BITS
            message = f"quantize.bits must be {', '.join(most)} or {last} for nncf, got {self.bits}"
            raise ValueError(message)
        moot = {
            "nncf": self._set_beside("algorithm", "bits"),
            "none": self._set_beside("algorithm"),
        }
        if found := moot.get(self.algorithm):
            message = f"quantize.{found[0]} is not for algorithm {self.algorithm}; leave it out"
            raise ValueError(message)
        return self

    def _set_beside(self, *names: str) -> list[str]:
        """Other keys than these whose value isn't the default."""
        return [
            name
            for name, field in type(self).model_fields.items()
            if name not in names and getattr(self, name) != field.default
        ]


class ExportSection(Section):
    """Files beyond those that the targets load."""

    formats: list[str] = Field(default=[], description="exporters' names, such as coreml")


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
    min_sqnr_db: float | None = Field(
        default=None, description="of every feature map against the original's, on real images"
    )


class Recipe(Section):
    """One run, complete."""

    version: Literal[1] = 1
    model: ModelSection
    prune: PruneSection = PruneSection()
    merge: MergeSection = MergeSection()
    sparsify: SparsifySection = SparsifySection()
    recover: RecoverSection = RecoverSection()
    quantize: QuantizeSection = QuantizeSection()
    calibration: CalibrationSection = CalibrationSection()
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    verify: VerifySection = VerifySection()
    targets: list[str] = Field(default=["cpu-onnxruntime"], min_length=1)
    measure: MeasureSection = MeasureSection()
    gates: GatesSection = GatesSection()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @property
    def batches(self) -> tuple[int, int]:
        """Images a call: as measured, and the most that any step of the run takes."""
        usual = self.measure.batch_size
        return usual, max(usual, self.evaluation.batch_size, *self.verify.batch_sizes)

    @property
    def shrinks(self) -> bool:
        """The model is changed before it is quantised."""
        return self.prune.active or self.merge.active or self.sparsify.active

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.model.gives_features and (refused := features_conflict(self)) is not None:
            raise ValueError(refused)
        if self.gates.max_drop is not None and self.model.weights == "random":
            message = "gates.max_drop needs trained weights, but model.weights is random"
            raise ValueError(message)
        if self.gates.max_drop is not None and self.evaluation.data is None:
            message = "gates.max_drop needs labelled images: give evaluation.data (--data DIR)"
            raise ValueError(message)
        wanted = self.quantize.optimize_for
        if wanted is not None and wanted not in self.targets:
            message = (
                f"quantize.optimize_for {wanted!r:.60} must be one of the targets "
                f"({', '.join(self.targets)}): add it with --targets"
            )
            raise ValueError(message)
        algorithm = self.quantize.algorithm
        if algorithm != "deploykit" and self.evaluation.simulation:
            message = f"evaluation.simulation is not for algorithm {algorithm}; leave it out"
            raise ValueError(message)
        if self.recover.active and not (self.shrinks or self.recover.quantization_aware):
            message = "recover.data is given, but nothing to recover from: prune, merge or sparsify"
            raise ValueError(message)
        if algorithm == "none" and not self.shrinks:
            message = (
                "quantize.algorithm none leaves nothing to do: "
                "set prune.ratio, merge.tokens or sparsify.pattern"
            )
            raise ValueError(message)
        return self
