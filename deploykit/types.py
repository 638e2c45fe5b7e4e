"""The nouns of the house, as typed, frozen data. Every room may import this module.

Sizes are bytes, times are milliseconds, accuracies are percent and drops are percentage
points unless a name says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

__all__ = [
    "REPORT_SCHEMA_VERSION",
    "STAGES",
    "Accuracy",
    "Artifact",
    "Backbone",
    "DeviceDescription",
    "FeatureLevel",
    "Fidelity",
    "GateResult",
    "LayerProfile",
    "LayerTime",
    "MachineState",
    "Measurement",
    "ParityRow",
    "PassRecord",
    "Preprocessing",
    "WeightsOrigin",
]

REPORT_SCHEMA_VERSION = 1

STAGES = ("pruned", "merged", "sparse", "recovered")
"""Float files of a run between the original and the compressed one, in the order of the steps."""


class Data(BaseModel):
    """Base of all serialisable nouns: immutable, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Preprocessing(Data):
    """How an image file becomes the network's input, (3, size, size) float32.

    The image is converted to RGB, its short side resized to ``floor(size / crop_pct)``,
    centre-cropped to ``size``, scaled to 0..1, then ``(x - mean) / std`` per channel.
    """

    size: int = Field(gt=0, le=4096, description="side of the square input in pixels")
    crop_pct: float = Field(default=1.0, gt=0, le=1)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class WeightsOrigin(Data):
    """Where a backbone's weights came from.

    ``untrained`` means trained weights were wanted but none could be had; ``random`` means the
    user asked for random weights. Neither is ever reported with an accuracy.
    """

    kind: Literal["hub", "file", "module", "random", "untrained"]
    source: str = Field(description="hub id, file path or 'module:factory' of the weights")
    sha256: str | None = None

    @property
    def trained(self) -> bool:
        return self.kind in ("hub", "file", "module")

    @property
    def label(self) -> str:
        """What tables and artefacts say: ``untrained`` unless trained weights were loaded."""
        return f"{self.kind}: {self.source}" if self.trained else "untrained"


class FeatureLevel(Data):
    """One of the feature maps a backbone gives instead of scores: (N, channels, height, width)."""

    name: str = Field(max_length=60, description="of the file's output: features_0 …")
    channels: int = Field(gt=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    stride: float = Field(
        gt=0, description="pixels of the image's side a step in the map stands for"
    )

    @property
    def values(self) -> int:
        """Numbers in one image's map."""
        return self.channels * self.height * self.width


@dataclass(frozen=True)
class Backbone:
    """An nn.Module in eval mode with everything needed to feed and name it.

    With ``levels`` it gives feature maps and has no classes; the maps come joined in one tensor
    (``graph/levels.py``).
    """

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    weights: WeightsOrigin
    num_classes: int
    family: str = ""
    paper: str = ""
    levels: tuple[FeatureLevel, ...] = ()


class PassRecord(Data):
    """What one pass did, for the report."""

    name: str
    summary: str
    details: dict[str, Any] = {}


class Artifact(Data):
    """One file that ships (or the float file it is compared with)."""

    name: str = Field(
        description="'original', a step on the way ('pruned' …), 'compressed', or whose file it is "
        "compared with"
    )
    format: str = Field(description="an exporter's name; (name, format) is unique")
    path: Path
    bytes: int
    sha256: str
    precision: str = Field(description="'fp32' or 'w4a8' …")
    algorithm: str = Field(
        default="", description="what quantised it, and its version; empty for the float file"
    )
    weights: str = Field(description="label of the weights' origin, 'untrained' if so")
    dynamic_batch: bool = Field(default=True, description="takes any number of images")
    half: bool = Field(default=False, description="floats are computed in float16")
    notes: list[str] = Field(default=[], description="what the exporter has to say")
    layers: dict[str, int] = Field(default={}, description="what the format made of the layers")
    integer: list[str] = Field(default=[], description="parts that run on integers here")
    wider: list[str] = Field(default=[], description="parts narrower on disk than when computed")
    simulated: list[str] = Field(default=[], description="parts whose codes run as floats")


class ParityRow(Data):
    """An artefact compared with the model it came from, on the same images."""

    artifact: str
    format: str = "onnx"
    precision: str = ""
    reference: str
    runtime: str
    batch: int
    level: str = Field(default="", description="which feature map; empty for scores")
    images: int
    data: str
    max_abs: float
    mean_abs: float
    sqnr_db: float
    top1_agreement: float | None = Field(
        description="percent; None for feature maps, which have no classes"
    )
    noise_db: float | None = Field(
        default=None, description="SQNR of the simulation against the float model"
    )
    floor_db: float | None = Field(
        default=None, description="SQNR of the simulation against itself, input changed by 1e-6"
    )
    tolerance: str = Field(description="what was demanded")
    passed: bool


class Accuracy(Data):
    """Top-1 of the original and of an artefact on the same images, paired image by image."""

    artifact: str
    format: str = "onnx"
    target: str = Field(default="", description="what ran the file; empty for a simulation")
    data: str
    images: int
    top1_original: float
    top1: float
    lost: int = Field(description="images right before and wrong after")
    gained: int = Field(description="images wrong before and right after")
    drop: float = Field(description="top1_original - top1, percentage points")
    drop_low: float = Field(description="lower end of the 95 % interval of the drop")
    drop_high: float = Field(description="upper end of the 95 % interval of the drop")
    simulated_top1: float | None = Field(
        default=None, description="the same codes in torch: a simulation, not the artefact"
    )


class Fidelity(Data):
    """How far one of a file's feature maps is from the original file's, on the same images."""

    artifact: str
    format: str = "onnx"
    target: str = Field(description="what ran both files")
    level: str
    data: str
    images: int
    sqnr_db: float = Field(description="of all images' values together")
    relative_error: float = Field(description="|file - original| / |original|, both as 2-norms")
    worst_sqnr_db: float = Field(description="of the image that changed most")


class MachineState(Data):
    """How fast and how warm the machine was at one moment. None where it doesn't tell."""

    cpu_mhz: float | None = Field(default=None, description="mean clock of the cores used")
    temperature_c: float | None = Field(default=None, description="hottest processor sensor")
    throttled: int | None = Field(
        default=None, description="times the cores used slowed down for heat since the start"
    )
    gpu_mhz: float | None = None
    gpu_temperature_c: float | None = None
    gpu_throttled: list[str] = Field(default=[], description="why its clock is held down")
    missing: list[str] = Field(default=[], description="what the machine doesn't tell, and why")


class DeviceDescription(Data):
    """The device and runtime a measurement was taken on."""

    target: str
    device: str
    cores: int
    threads: int
    pinned_to: list[int]
    isa: list[str] = []
    governor: str | None = None
    accelerator: str | None = Field(default=None, description="the GPU, where that is what ran")
    drivers: dict[str, str] = Field(default={}, description="their versions")
    runtime: str
    os: str
    before: MachineState | None = None
    after: MachineState | None = None


class Measurement(Data):
    """Latency and memory of one artefact on one target. A withheld percentile is None."""

    artifact: str
    format: str = "onnx"
    target: str
    precision: str
    batch: int
    samples: int
    p50_ms: float
    p50_low_ms: float = Field(description="lower end of the 95 % bootstrap interval of p50")
    p50_high_ms: float
    p90_ms: float | None
    p99_ms: float | None
    withheld: str | None = Field(default=None, description="why a percentile is None")
    noisy: bool = Field(description="the interval is too wide for the figure to be used")
    ratio: float | None = Field(
        default=None,
        description="time against the original's: fastest call of a block by the original's in it, "
        "median over interleaved blocks",
    )
    ratio_noisy: bool | None = Field(
        default=None,
        description="the ratio's interval is too wide for a comparison; in old reports None: "
        "noisy says it then",
    )
    ratio_low: float | None = None
    ratio_high: float | None = None
    peak_rss_bytes: int | None = None
    device_memory_bytes: int | None = Field(
        default=None, description="most memory held on the GPU, where there is one"
    )
    load_ms: float | None = None
    first_call_ms: float | None = Field(
        default=None, description="of a file just loaded: some runtimes plan or compile in it"
    )
    ran_as: str = Field(default="", description="the precision that really ran, by the runtime")
    energy_mj: float | None = Field(default=None, description="millijoules of one call")
    energy: str = Field(default="", description="what counted it, or why nothing did")
    warmup: dict[str, float | bool] = {}
    kernels: dict[str, int] = Field(
        default={}, description="computing kernels of the loaded file: int8 or float, and how many"
    )
    device: DeviceDescription
    samples_ms: list[float] = Field(default=[], description="every timed call, in order")

    @property
    def comparison_noisy(self) -> bool:
        """The ratio can't be used, though the median may be, or the other way round."""
        return self.noisy if self.ratio_noisy is None else self.ratio_noisy


class LayerTime(Data):
    """Time of one kernel of a file on a target, and the layer it was spent for."""

    layer: str = Field(description="empty where the kernel can't be mapped to a layer")
    kind: Literal["compute", "quantise", "reformat", "other"]
    kernel: str = Field(description="the runtime's name for what ran")
    op: str = Field(description="what it computes, in the runtime's words")
    precision: str = Field(description="really run in: 'int8', 'float32', 'bfloat16' …")
    ms: float = Field(description="of one call; a file's kernels add up to its total")
    rounds_ms: list[float] = Field(default=[], description="ms in each round of the profile")
    share: float = Field(description="of the file's total, 0..1")


class LayerProfile(Data):
    """Where one file's time goes on one target."""

    artifact: str
    format: str = "onnx"
    target: str
    total_ms: float = Field(description="median of unprofiled calls, to which times are scaled")
    layers: list[LayerTime]


class GateResult(Data):
    """One limit and whether it held."""

    name: str
    limit: float
    value: float | None
    passed: bool
    reason: str
    exit_code: int = 0
