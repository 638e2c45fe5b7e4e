"""SparseGPT: weights are removed where that costs least, and the later ones make up for it.

Optimal Brain Surgeon (Hassibi and Stork 1993) with SparseGPT's order (arXiv 2301.00774): columns
from left to right, with the Hessian ``H`` of the layer's squared output error, the Gram matrix of
its inputs; what lies to the left is settled. Each output's error is spread over its own remaining
weights.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from deploykit.graph.second_order import damped, feedback_factor
from deploykit.prune.masks import keep_largest

__all__ = ["LARGEST_GROUP", "obs_n_of_m", "obs_unstructured"]

LARGEST_GROUP = 8
"""A group's removals are tried in all combinations; more than C(8, 4) = 70 would be slow."""

_COLUMNS = 128  # SparseGPT's lazy updates: the rest is updated by one product after so many


def obs_n_of_m(weight: Tensor, gram: Tensor, keep: int, group: int, damping: float) -> Tensor:
    """Keep ``keep`` of each ``group`` consecutive inputs of every output.

    The weights that leave a group are chosen jointly: of all combinations ``P`` the one with the
    least error ``w_P^T (A_PP)^-1 w_P / 2``, where ``A`` is the inverse of ``H`` without the
    settled columns (OBS for several weights at once). SparseGPT scores each weight alone.

    Args:
        weight: float32 (O, K), K divisible by ``group``, which is ``LARGEST_GROUP`` at most.
        gram: of the inputs, (K, K).
        damping: ridge on it, as a part of its mean diagonal.

    Returns:
        float32 (O, K) with at least ``group - keep`` zeros in each group.
    """
    rest, factor = weight.clone(), _factor(gram, damping)
    columns = rest.shape[1]
    step = max(_COLUMNS // group, 1) * group
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = torch.zeros(len(rest), end - start)
        for left in range(start, end, group):
            right = left + group
            corner = factor[left:right, left:right]
            removed, solution = _cheapest(rest[:, left:right], corner, group - keep)
            error = solution @ corner.t()
            errors[:, left - start : right - start] = error
            rest[:, left:end] -= error @ factor[left:right, left:end]
            rest[:, left:right][removed] = 0.0  # exactly
        rest[:, end:] -= errors @ factor[start:end, end:]
    return rest


def obs_unstructured(weight: Tensor, gram: Tensor, zeros: int, damping: float) -> Tensor:
    """Zero ``zeros`` weights, the cheapest of each 128 columns by ``w^2 / A_jj``.

    Args:
        weight: float32 (O, K).
        gram, damping: as in ``obs_n_of_m``.
        zeros: of the whole matrix; every 128 columns get their part of it.
    """
    rest, factor = weight.clone(), _factor(gram, damping)
    outputs, columns = rest.shape
    diagonal = factor.diagonal()
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        share = zeros * end // columns - zeros * start // columns
        scores = rest[:, start:end].square() / diagonal[start:end].square()
        removed = ~keep_largest(scores, share)
        errors = torch.zeros(outputs, end - start)
        for i in range(start, end):
            error = torch.where(removed[:, i - start], rest[:, i] / diagonal[i], 0.0)
            errors[:, i - start] = error
            rest[:, i + 1 : end] -= error[:, None] * factor[i, i + 1 : end]
        rest[:, start:end][removed] = 0.0
        rest[:, end:] -= errors @ factor[start:end, end:]
    return rest


def _factor(gram: Tensor, damping: float) -> Tensor:
    """Upper U with ``U^T U = (H + ridge)^-1``.

    Its lower right part from column j on is the same factor for H without the columns before j.
    """
    order = torch.arange(len(gram))[None]
    return feedback_factor(damped(gram[None], damping), order)[0]


def _cheapest(weight: Tensor, corner: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which ``count`` of a group's weights leave, and ``(A_PP)^-1 w_P`` of them.

    Args:
        weight: (O, m), the group.
        corner: (m, m), the group's part of U: ``A = corner^T corner``.

    Returns:
        bool (O, m) and float32 (O, m), zero where a weight stays.
    """
    inverse = (corner.t() @ corner).double()
    sets = torch.tensor(list(combinations(range(len(corner)), count)))  # (S, count)
    parts = inverse[sets[:, :, None], sets[:, None, :]]  # (S, count, count)
    chosen = weight.double()[:, sets]  # (O, S, count)
    solutions = torch.linalg.solve(parts, chosen.permute(1, 2, 0)).permute(2, 0, 1)
    best = (chosen * solutions).sum(-1).argmin(1)  # the first of equals
    columns = sets[best]
    solution = solutions.gather(1, best[:, None, None].expand(-1, 1, count))[:, 0].float()
    empty = torch.zeros_like(weight)
    return empty.bool().scatter(1, columns, True), empty.scatter(1, columns, solution)
