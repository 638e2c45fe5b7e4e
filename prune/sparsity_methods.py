"""How zeros are chosen, by name. A further method is one function and one ``register``.

A method scores the units of a pattern (weights, or blocks of them) and zeroes those that score
least; or, where it has an ``update``, it chooses and changes the other weights itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deploykit.errors import UsageError
from deploykit.prune.masks import block_sums, keep_largest, keep_n_of_m, spread_blocks
from deploykit.prune.sparsity_obs import LARGEST_GROUP, obs_n_of_m, obs_unstructured
from deploykit.prune.sparsity_patterns import Pattern, PatternKind
from deploykit.prune.sparsity_statistics import Needs

__all__ = ["METHODS", "LayerInputs", "Method", "find_method", "prune_matrix"]


@dataclass(frozen=True)
class LayerInputs:
    """What a method may know of a layer's inputs, as far as its ``needs`` go.

    Attributes:
        squares: mean square of every column's input, float64 (K,).
        gram: mean of ``x x^T`` (or the covariance, where the bias takes up the mean), (K, K).
        damping: ridge on ``gram``, as a part of its mean diagonal.
    """

    squares: Tensor | None = None
    gram: Tensor | None = None
    damping: float = 0.01


Score = Callable[[Tensor, LayerInputs, Pattern], Tensor]
Update = Callable[[Tensor, LayerInputs, Pattern, int], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to choose what is zeroed.

    Attributes:
        score: of a weight matrix (O, K): one number a unit, not negative, additive over units
            and in units of the layer's squared weights or output; (O, K) or (O / b, K / b).
        update: gives the sparse matrix from (matrix, inputs, pattern, units to zero), where the
            method also changes what stays; None keeps it.
        source: where it is from.
    """

    name: str
    patterns: frozenset[PatternKind]
    needs: Needs
    score: Score
    source: str
    update: Update | None = None

    def check(self, pattern: Pattern) -> None:
        """
        Raises:
            UsageError: the method doesn't make this pattern.
        """
        if pattern.kind not in self.patterns:
            fit = [m.name for m in METHODS.values() if pattern.kind in m.patterns]
            message = f"method {self.name} makes no {pattern} zeros; use {' or '.join(fit)}"
            raise UsageError(message)
        if self.update is obs_update and pattern.group > LARGEST_GROUP:
            message = (
                f"method {self.name} takes groups of {LARGEST_GROUP} at most, not {pattern}; "
                "use magnitude or wanda"
            )
            raise UsageError(message)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    METHODS[method.name] = method
    return method


def find_method(name: str) -> Method:
    """
    Raises:
        UsageError: there is none of that name.
    """
    if name not in METHODS:
        message = f"no sparsity method is called {name[:40]!r}; there are {', '.join(METHODS)}"
        raise UsageError(message)
    return METHODS[name]


def prune_matrix(
    method: Method, matrix: Tensor, inputs: LayerInputs, pattern: Pattern, zeros: int
) -> Tensor:
    """A layer's weight with the pattern's zeros.

    Args:
        matrix: float32 (O, K), see ``to_matrix``.
        zeros: weights or blocks to zero; for n:m it follows from the pattern.

    Returns:
        float32 (O, K).
    """
    if method.update is not None:
        return method.update(matrix, inputs, pattern, zeros)
    scores = method.score(matrix, inputs, pattern)
    if pattern.kind == "n:m":
        mask = keep_n_of_m(scores, pattern.keep, pattern.group)
    else:
        mask = spread_blocks(keep_largest(scores, zeros), pattern.block)
    return torch.where(mask, matrix, 0.0)


def magnitude(matrix: Tensor, inputs: LayerInputs, pattern: Pattern) -> Tensor:  # noqa: ARG001
    """``w^2``, summed over a block."""
    return block_sums(matrix.double().square(), pattern.block)


def wanda(matrix: Tensor, inputs: LayerInputs, pattern: Pattern) -> Tensor:
    """``(|w| |x|)^2``, the squared output that the weight alone makes.

    Compared within a group of an output for n:m, within the layer for unstructured zeros (the
    paper found comparing output by output no better in image classifiers).
    """
    assert inputs.squares is not None
    return block_sums(matrix.double().square() * inputs.squares, pattern.block)


def distortion(matrix: Tensor, inputs: LayerInputs, pattern: Pattern) -> Tensor:
    """Squared change of the output without a block, ``sum over its rows of w^T H w``.

    The second-order Taylor term of the output's distortion (the first is zero, and there is no
    third, since the layer is linear); LPViT, arXiv 2407.02068, section 3. Unlike the sum of
    single weights' it knows that weights of correlated inputs add up or cancel.
    """
    assert inputs.gram is not None
    block, columns = pattern.block, matrix.shape[1]
    parts = columns // block
    diagonal = inputs.gram.reshape(parts, block, parts, block).diagonal(dim1=0, dim2=2)
    blocks = diagonal.permute(2, 0, 1).double()  # (K / b, b, b)
    rows = matrix.double().reshape(-1, parts, block).transpose(0, 1)  # (K / b, O, b)
    per_row = ((rows @ blocks) * rows).sum(-1).clamp(min=0).t()  # (O, K / b)
    return per_row.reshape(-1, block, parts).sum(1)


def obs_score(matrix: Tensor, inputs: LayerInputs, pattern: Pattern) -> Tensor:  # noqa: ARG001
    """``w^2 H_jj``: what a weight's removal costs before others make up for it.

    For sharing out zeros among layers only; within a layer ``obs_update`` decides.
    """
    assert inputs.gram is not None
    return matrix.double().square() * inputs.gram.diagonal().double()


def obs_update(matrix: Tensor, inputs: LayerInputs, pattern: Pattern, zeros: int) -> Tensor:
    assert inputs.gram is not None
    if pattern.kind == "n:m":
        return obs_n_of_m(matrix, inputs.gram, pattern.keep, pattern.group, inputs.damping)
    return obs_unstructured(matrix, inputs.gram, zeros, inputs.damping)


register(
    Method(
        "magnitude", frozenset({"n:m", "block", "unstructured"}), "nothing", magnitude,
        "NVIDIA ASP (arXiv 2104.08378)",
    )
)  # fmt: skip
register(
    Method("wanda", frozenset({"n:m", "unstructured"}), "norms", wanda, "Wanda (arXiv 2306.11695)")
)
register(
    Method(
        "sparsegpt", frozenset({"n:m", "unstructured"}), "gram", obs_score,
        "SparseGPT (arXiv 2301.00774), groups chosen jointly", update=obs_update,
    )
)  # fmt: skip
register(Method("distortion", frozenset({"block"}), "gram", distortion, "LPViT (arXiv 2407.02068)"))
