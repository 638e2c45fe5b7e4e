"""One merge: match the tokens, then move them by products with matrices of zeros and ones.

No Scatter and no Gather: runtimes differ in what they make of those (TensorRT 8.6 takes
ScatterElements and ignores its reduction), while TopK, Equal and MatMul are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from deploykit.prune.merge_emit import END, Emitter
from deploykit.prune.merge_scorers import Halves, Scorer, TokenView

__all__ = ["Match", "match", "merge", "unmerge"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """Which of the A tokens stay, and where the others go.

    Attributes:
        halves: which tokens are A and B.
        r: how many A tokens go.
        kept: (B, A - r, A) of 0 and 1: row i picks the i-th A that stays.
        moved: (B, B', A) of 0 and 1: row j picks every A that goes into the j-th B.
        weights: (B, N, 1) what each token counts beside its size, or None.
    """

    halves: Halves
    r: int
    kept: fx.Node
    moved: fx.Node
    weights: fx.Node | None


def match(emit: Emitter, view: TokenView, halves: Halves, r: int, scorer: Scorer) -> Match:
    """Bipartite soft matching: of the best partners in B of all A, the r best pairs merge.

    Equal to ToMe's (Bolya et al., 2023, Appendix D) but for the order of the tokens that stay.
    """
    scored = scorer(emit, view, halves)
    best = emit(aten.max.dim, scored.scores, -1)
    score, partner = emit.item(best, 0), emit.item(best, 1)
    order = emit.item(emit(aten.topk.default, score, halves.count_a, -1, True, True), 1)
    stays = emit(aten.unsqueeze.default, emit.slice(order, 1, r), -1)
    kept = _one_hot(emit, stays, emit.positions(halves.count_a), view.metric)
    goes = emit(aten.rsub.Scalar, emit(aten.sum.dim_IntList, kept, [1], True), 1)
    columns = emit(aten.unsqueeze.default, emit.positions(halves.count_b), -1)
    into = _one_hot(emit, emit(aten.unsqueeze.default, partner, 1), columns, view.metric)
    return Match(halves, r, kept, emit(aten.mul.Tensor, into, goes), scored.weights)


def _one_hot(emit: Emitter, left: fx.Node, right: fx.Node, like: fx.Node) -> fx.Node:
    """1 where two indices are equal and 0 elsewhere, in the type of ``like``."""
    return emit(aten.type_as.default, emit(aten.eq.Tensor, left, right), like)


def merge(
    emit: Emitter, found: Match, x: fx.Node, sizes: fx.Node | None
) -> tuple[fx.Node, fx.Node]:
    """The merged tokens (B, N - r, C), protected first, and their sizes (B, N - r, 1).

    A merged token is the mean of its tokens weighted by their sizes.

    Args:
        x: (B, N, C).
        sizes: (B, N, 1), or None where each token is one.
    """
    halves = found.halves
    if sizes is None:
        sizes = emit(aten.ones_like.default, emit.slice(x, 2, 0, 1))
    weights = sizes
    if found.weights is not None:
        weights = emit(aten.mul.Tensor, found.weights, sizes)
    new_sizes, in_b = _gather_up(emit, found, sizes)
    total = in_b if weights is sizes else _gather_up(emit, found, weights)[1]
    (a, b), (weight_a, weight_b) = halves.split(emit, x), halves.split(emit, weights)
    moved = emit(aten.matmul.default, found.moved, emit(aten.mul.Tensor, a, weight_a))
    summed = emit(aten.add.Tensor, emit(aten.mul.Tensor, b, weight_b), moved)
    means = emit(aten.div.Tensor, summed, total)
    parts = [emit(aten.matmul.default, found.kept, a), means]
    if halves.protected:
        parts.insert(0, emit.slice(x, 1, 0, halves.protected))
    return emit(aten.cat.default, parts, 1), new_sizes


def _gather_up(emit: Emitter, found: Match, sizes: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Summed sizes of all tokens after the merge, and of those in B alone."""
    a, b = found.halves.split(emit, sizes)
    in_b = emit(aten.add.Tensor, b, emit(aten.matmul.default, found.moved, a))
    parts = [emit(aten.matmul.default, found.kept, a), in_b]
    if found.halves.protected:
        parts.insert(0, emit.slice(sizes, 1, 0, found.halves.protected))
    return emit(aten.cat.default, parts, 1), in_b


def unmerge(emit: Emitter, found: Match, x: fx.Node) -> fx.Node:
    """The tokens at their old places, (B, N, C): each gets the value of what it merged into.

    Args:
        x: (B, N - r, C), in the order that ``merge`` gives.
    """
    halves = found.halves
    b = emit.slice(x, 1, halves.protected + halves.count_a - found.r)
    picks = emit(aten.cat.default, [found.kept, found.moved], 1)
    rows = emit.slice(x, 1, halves.protected) if halves.protected else x
    a = emit(aten.matmul.default, emit(aten.transpose.int, picks, 1, 2), rows)
    parts = [emit.slice(x, 1, 0, halves.protected)] if halves.protected else []
    left, right = (a, b) if halves.first_a < halves.first_b else (b, a)
    pairs = min(halves.count_a, halves.count_b)
    stacked = emit(
        aten.stack.default, [emit.slice(left, 1, 0, pairs), emit.slice(right, 1, 0, pairs)], 2
    )
    parts.append(emit(aten.flatten.using_ints, stacked, 1, 2))
    if halves.count_a != halves.count_b:
        parts.append(emit.slice(left, 1, pairs, END))
    return emit(aten.cat.default, parts, 1) if len(parts) > 1 else parts[0]
