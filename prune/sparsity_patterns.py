"""Which zeros are asked for: n of m, blocks, or anywhere."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from deploykit.errors import UsageError

__all__ = ["Pattern", "PatternKind", "from_matrix", "parse_pattern", "to_matrix"]

PatternKind = Literal["n:m", "block", "unstructured"]

_WORDS = re.compile(r"(?P<keep>\d{1,3}):(?P<group>\d{1,3})|block(?P<block>\d{1,3})|unstructured")


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros in a weight matrix (outputs, inputs).

    Attributes:
        kind: ``n:m`` keeps ``keep`` of each ``group`` consecutive inputs of an output;
            ``block`` zeroes whole squares of ``block`` outputs by ``block`` inputs;
            ``unstructured`` zeroes any weight.
    """

    kind: PatternKind
    keep: int = 0
    group: int = 0
    block: int = 1

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.keep}:{self.group}"
        return f"block{self.block}" if self.kind == "block" else self.kind

    @property
    def on_tensor_cores(self) -> bool:
        """Whether some hardware skips these zeros: NVIDIA's sparse tensor cores do 2:4 only."""
        return (self.keep, self.group) == (2, 4)

    def units(self, weights: int) -> int:
        """How many weights or blocks of them are kept or zeroed as one."""
        return weights // self.block**2


def parse_pattern(text: str) -> Pattern:
    """``2:4`` (two of four stay), ``block16``, ``unstructured``.

    Raises:
        UsageError: it is none of these.
    """
    match = _WORDS.fullmatch(text)
    if match is not None and match["group"]:
        keep, group = int(match["keep"]), int(match["group"])
        if 0 < keep < group:
            return Pattern("n:m", keep=keep, group=group)
    elif match is not None and match["block"]:
        if int(match["block"]) > 1:
            return Pattern("block", block=int(match["block"]))
    elif match is not None:
        return Pattern("unstructured")
    message = (
        f"sparsity pattern {text[:40]!r}: wanted n:m with 0 < n < m (2:4 keeps two of four), "
        "block16, block32 or unstructured"
    )
    raise UsageError(message)


def to_matrix(weight: Tensor) -> Tensor:
    """A weight (out, in, *kernel) as (out, positions * in), a copy where it must be.

    Columns of one kernel position lie together, so that groups and blocks of consecutive columns
    hold neighbouring input channels, as NVIDIA's 2:4 kernels group them.
    """
    return weight.movedim(1, -1).reshape(len(weight), -1)


def from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
    """``to_matrix`` undone, in the shape of ``weight``."""
    out, inputs, *kernel = weight.shape
    return matrix.reshape(out, *kernel, inputs).movedim(-1, 1)
