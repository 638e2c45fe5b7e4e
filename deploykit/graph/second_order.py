"""What second-order methods need of a layer's Gram or covariance matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["damped", "feedback_factor"]


def feedback_factor(matrix: Tensor, order: Tensor) -> Tensor:
    """Upper U with ``U^T U = H^-1``, for H with its rows and columns in ``order``.

    U is the inverse of R in ``H = R R^T`` with R upper, which is the Cholesky factor of H turned
    upside down: H itself is never inverted.

    Args:
        matrix: H of G layers, float32 (G, K, K), positive definite.
        order: (G, K), the column that comes first, second …

    Returns:
        float32 (G, K, K).
    """
    rows = matrix.gather(1, order[:, :, None].expand_as(matrix))
    ordered = rows.gather(2, order[:, None, :].expand_as(matrix))
    lower = torch.linalg.cholesky(ordered.flip(1, 2).double()).float().flip(1, 2)
    eye = torch.eye(matrix.shape[-1]).expand_as(matrix)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye, upper=True)
    return inverse


def damped(matrix: Tensor, damping: float) -> Tensor:
    """With a ridge; a channel that never varies gets a ridge too, so it can be inverted.

    Args:
        matrix: (G, K, K).
        damping: the ridge, as a part of the mean diagonal.
    """
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    ridge = damping * diagonal.mean(1, keepdim=True)
    ridge = torch.where(ridge > 0, ridge, torch.ones_like(ridge))
    return matrix + torch.diag_embed(ridge.expand_as(diagonal))
