"""Which tokens are alike: one function a score, registered by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from deploykit.errors import UsageError
from deploykit.prune.merge_emit import Emitter

__all__ = ["SCORERS", "Halves", "Scored", "Scorer", "TokenView", "find_scorer", "register_scorer"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Halves:
    """The tokens that can merge: those that go (A, the even ones) and those that stay (B, odd).

    Attributes:
        protected: how many tokens in front do neither.
        tokens: all, the protected ones included.
    """

    protected: int
    tokens: int

    @property
    def first_a(self) -> int:
        return self.protected + self.protected % 2

    @property
    def first_b(self) -> int:
        return self.protected + 1 - self.protected % 2

    @property
    def count_a(self) -> int:
        return len(range(self.first_a, self.tokens, 2))

    @property
    def count_b(self) -> int:
        return len(range(self.first_b, self.tokens, 2))

    @property
    def most(self) -> int:
        """How many can merge. One A always stays: OpenVINO fails on a matrix without rows."""
        return max(min((self.tokens - self.protected) // 2, self.count_a - 1), 0)

    def split(self, emit: Emitter, x: fx.Node, axis: int = 1) -> tuple[fx.Node, fx.Node]:
        """A and B of a value with the tokens along ``axis``."""
        a = emit.slice(x, axis, self.first_a, step=2)
        return a, emit.slice(x, axis, self.first_b, step=2)


@dataclass(frozen=True)
class TokenView:
    """What a scorer can look at, N tokens.

    Attributes:
        metric: (B, N, D) float, what tokens are compared by; any length.
        attention: (B, H, N, N) or (B, N, N) attention weights, None outside an attention block.
        sizes: (B, N, 1) float, how many tokens are in each; None where each is one.
    """

    metric: fx.Node
    attention: fx.Node | None
    sizes: fx.Node | None


@dataclass(frozen=True)
class Scored:
    """Attributes:
    scores: (B, A, B') float, higher for pairs that are better merged.
    weights: (B, N, 1) float, what each token counts in the mean beside its size; or None.
    """

    scores: fx.Node
    weights: fx.Node | None = None


Scorer = Callable[[Emitter, TokenView, Halves], Scored]

SCORERS: dict[str, Scorer] = {}


def register_scorer(name: str) -> Callable[[Scorer], Scorer]:
    """Add a scorer under a name that ``MergeOptions.scorer`` can give."""

    def add(scorer: Scorer) -> Scorer:
        SCORERS[name] = scorer
        return scorer

    return add


def find_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in SCORERS:
        raise UsageError(f"no token scorer {name!r}; there are {', '.join(sorted(SCORERS))}")
    return SCORERS[name]


def _cosine(emit: Emitter, metric: fx.Node, halves: Halves) -> fx.Node:
    """Cosine of every A with every B."""
    norm = emit(aten.linalg_vector_norm.default, metric, 2, [-1], True)
    unit = emit(aten.div.Tensor, metric, emit(aten.clamp_min.default, norm, 1e-6))
    a, b = halves.split(emit, unit)
    return emit(aten.matmul.default, a, emit(aten.transpose.int, b, -2, -1))


@register_scorer("tome")
def tome(emit: Emitter, view: TokenView, halves: Halves) -> Scored:
    """Cosine of the keys (Bolya et al., Token Merging, ICLR 2023)."""
    return Scored(_cosine(emit, view.metric, halves))


@register_scorer("mctf")
def mctf(emit: Emitter, view: TokenView, halves: Halves) -> Scored:
    """Likeness, little attention received and small size (Lee et al., MCTF, CVPR 2024).

    ``(cos + 1) / 2 * (1 / (a_i a_j))^(1/20) * (1 / (s_i s_j))^(1/40)`` with the mean attention
    ``a`` that a token receives and its size ``s``; a token counts ``a s`` in the mean. The
    paper divides each inverse by the image's largest: that changes no order and is left out, as
    are its second direction of matching and its reuse of the attention.
    """
    likeness = emit(
        aten.mul.Tensor, emit(aten.add.Tensor, _cosine(emit, view.metric, halves), 1.0), 0.5
    )
    factor = weights = None
    if view.attention is not None:
        axes = list(range(1, len(emit.shape(view.attention)) - 1))
        received = emit(aten.mean.dim, view.attention, axes)
        received = emit(aten.clamp_min.default, received, 1e-6)
        weights = emit(aten.unsqueeze.default, received, -1)
        factor = emit(aten.pow.Tensor_Scalar, weights, -1 / 20)
    if view.sizes is not None:
        small = emit(aten.pow.Tensor_Scalar, view.sizes, -1 / 40)
        factor = small if factor is None else emit(aten.mul.Tensor, factor, small)
    if factor is not None:
        a, b = halves.split(emit, factor)
        likeness = emit(aten.mul.Tensor, likeness, a)
        likeness = emit(aten.mul.Tensor, likeness, emit(aten.transpose.int, b, -2, -1))
    return Scored(likeness, weights)
