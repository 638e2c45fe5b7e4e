"""The recipe's sections that change a model before it is quantised, in the order they happen."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from deploykit._recipe_section import Section, UserPath

__all__ = ["MergeSection", "PruneSection", "RecoverSection", "SparsifySection"]

_PATTERN = re.compile(r"none|block16|block32|unstructured|([1-9]\d?):([1-9]\d?)")


def parse_tokens(value: object) -> str:
    """``none``, ``auto``, ``fast``, a number, or numbers joined by commas; a list is joined.

    Raises:
        ValueError: the value is none of these.
    """
    parts = value if isinstance(value, list) else str(value).strip().lower().split(",")
    text = ",".join(str(part).strip() for part in parts)
    numbers = text.split(",")
    if text in ("none", "auto", "fast"):
        return text
    if all(number.isdecimal() for number in numbers) and any(int(n) for n in numbers):
        return ",".join(str(int(number)) for number in numbers)
    message = f"tokens must be none, auto, fast, a number or numbers such as 8,8,0, got {value!r}"
    raise ValueError(message)


def parse_pattern(value: object) -> str:
    """``none``, ``block16``, ``block32``, ``unstructured``, or ``n:m``: n of each m inputs stay.

    Raises:
        ValueError: the value is none of these, or n isn't below m.
    """
    text = str(value).strip().lower()
    match = _PATTERN.fullmatch(text)
    if match is None or (match[1] and int(match[1]) >= int(match[2])):
        wanted = "none, 2:4 (or n:m, n < m), block16, block32 or unstructured"
        message = f"pattern must be {wanted}, got {value!r}"
        raise ValueError(message)
    return text


TokensText = Annotated[str, BeforeValidator(parse_tokens)]
PatternText = Annotated[str, BeforeValidator(parse_pattern)]
PruneScope = Literal["mlp", "heads", "qk", "v", "conv", "embedding"]


class PruneSection(Section):
    """Structured pruning: widths and blocks that go for good."""

    ratio: float | None = Field(
        default=None, gt=0, le=0.95, description="share of the budget that goes"
    )
    budget: Literal["macs", "parameters", "latency"] = Field(
        default="macs",
        description="what the ratio is a share of; latency: as measured here, layer by layer",
    )
    importance: Literal["magnitude", "taylor", "hessian", "dimap"] = Field(
        default="hessian", description="what a width is worth"
    )
    scope: list[PruneScope] = Field(default=["mlp", "heads", "conv"], min_length=1)
    fairness: Literal["auto", "none", "kind", "layer"] = Field(
        default="auto",
        description="importances compare as they are, within a kind, or a layer; auto: as suits "
        "the importance",
    )
    layer_limit: float = Field(
        default=0.75, gt=0, le=0.95, description="most that one layer may lose"
    )
    blocks: int = Field(default=0, ge=0, description="whole residual blocks that go first")
    round_to: int = Field(default=8, ge=1, description="widths stay multiples of it")
    images: int = Field(default=128, gt=0, description="calibration images that are read")

    @property
    def active(self) -> bool:
        """Anything is asked for."""
        return self.ratio is not None or self.blocks > 0


class MergeSection(Section):
    """Token merging."""

    tokens: TokensText = Field(
        default="none",
        description="that go in every block: 8; block by block: 8,8,0; fast: many in three "
        "blocks; auto: as many as max_drop allows on calibration images",
    )
    schedule: Literal["constant", "decreasing"] = Field(
        default="constant", description="one number: of every block, or on the average of all"
    )
    share: float = Field(
        default=0.35, gt=0, le=0.5, description="of a block's tokens, that fast merges"
    )
    place: Literal["stream", "local"] = Field(
        default="stream",
        description="for good; or around each MLP only, so that any layout survives",
    )
    scorer: Literal["tome", "mctf"] = "tome"
    max_drop: float | None = Field(
        default=None,
        gt=0,
        description="points of accuracy auto may lose; None: gates.max_drop, else 1",
    )
    images: int = Field(default=512, gt=0, description="of calibration.data that auto judges on")

    @property
    def active(self) -> bool:
        """Anything is asked for."""
        return self.tokens != "none"


class SparsifySection(Section):
    """Weights that become zero."""

    pattern: PatternText = Field(
        default="none",
        description="none, 2:4 (or n:m), block16, block32, unstructured; "
        "all but 2:4 gain size only",
    )
    method: Literal["magnitude", "wanda", "sparsegpt", "distortion"] | None = Field(
        default=None,
        description="which weights go; None: sparsegpt (for blocks distortion), magnitude without "
        "calibration images",
    )
    sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of zeros, of blocks and unstructured; None: half",
    )
    allocation: Literal["uniform", "global"] = Field(
        default="uniform", description="every layer the same share, or what costs least in all"
    )
    exclude: list[str] = Field(default=[], description="layer names (globs) that stay dense")
    images: int = Field(default=128, gt=0, description="calibration images that are read")

    @property
    def active(self) -> bool:
        """Anything is asked for."""
        return self.pattern != "none"


class RecoverSection(Section):
    """Short training of the changed model, with the original as its teacher."""

    data: UserPath | None = Field(default=None, description="a folder of images; labels optional")
    minutes: float = Field(default=20.0, gt=0, description="of training at most")
    epochs: float = Field(default=4.0, gt=0, description="over the images at most")
    batch_size: int = Field(default=32, gt=0)
    learning_rate: float | None = Field(
        default=None, gt=0, description="none: by the distance from the original"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="of the products; auto: bf16 where the processor has it"
    )
    losses: dict[Literal["logits", "embedding", "features", "attention", "labels"], float] = Field(
        default={"logits": 1.0, "embedding": 1.0, "features": 1.0},
        min_length=1,
        description="what is learnt, and its weight; labels are the folder's",
    )
    workers: int = Field(default=0, ge=0, le=64, description="processes that read images")
    quantization_aware: bool = Field(
        default=False, description="train once more under quantisers of quantize.bits (GPUSQ-ViT)"
    )
    soup: int = Field(default=1, ge=1, le=8, description="recoveries whose weights are averaged")
    soup_method: Literal["uniform", "greedy"] = "greedy"

    @property
    def active(self) -> bool:
        """Anything is asked for."""
        return self.data is not None

    @model_validator(mode="after")
    def _needs_data(self) -> RecoverSection:
        if self.data is None and (self.quantization_aware or self.soup > 1):
            message = "recover.data is wanted: a folder of images to train on (--recover DIR)"
            raise ValueError(message)
        if self.quantization_aware and self.soup > 1:
            message = "recover.soup averages floats, not what quantization_aware makes; leave one"
            raise ValueError(message)
        return self
