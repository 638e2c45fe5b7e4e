"""Ridge correction of a weight (ERQ) and rounding with error feedback (GPTQ)."""

from __future__ import annotations

import torch
from torch import Tensor

from deploykit.graph.second_order import damped, feedback_factor

__all__ = ["gptq_codes", "remaining_error", "ridge_correction"]

BLOCK = 32  # columns rounded before the rest is updated by one matrix product


def ridge_correction(covariance: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Change of a weight that best makes up for an error its input predicts.

    ``dW^T = (C + d I)^-1 C_xe`` (ERQ, arXiv 2407.06794, eq. 8, with moments about the mean so that
    the bias is free; the ridge is relative to C's mean diagonal instead of an absolute number).

    Args:
        covariance: C of the quantised input, float32 (G, K, K).
        cross: C_xe of the input with the output error, (G, K, O).
        damping: d, as a part of C's mean diagonal.

    Returns:
        float32 (G, O, K), to be added to the weight.
    """
    factor = torch.linalg.cholesky(damped(covariance, damping).double())
    return torch.cholesky_solve(cross.double(), factor).transpose(1, 2).float()


def remaining_error(change: Tensor, covariance: Tensor, cross: Tensor) -> float:
    """How much a change of a weight adds to (below 0: takes off) its mean squared output error.

    Args:
        change: dW, (G, O, K).
        covariance, cross: of inputs it wasn't fitted on, as in ``ridge_correction``.
    """
    quadratic = ((change @ covariance) * change).sum(dtype=torch.float64)
    return float(quadratic - 2 * (change * cross.transpose(1, 2)).sum(dtype=torch.float64))


def gptq_codes(
    weight: Tensor,
    scale: Tensor,
    bits: int,
    covariance: Tensor,
    damping: float = 0.01,
    keep: Tensor | None = None,
) -> Tensor:
    """Round column by column; each column's error is made up for by those still to come.

    GPTQ (arXiv 2210.17323, algorithm 1) with columns in order of falling variance. The whole
    problem of G groups is one batch.

    Args:
        weight: float32 (G, O, K).
        scale: float32 (G, O), of symmetric codes.
        bits: width of the codes.
        covariance: of the layer's input, (G, K, K).
        damping: part of the mean diagonal added to it.
        keep: bool (G, O, K); where it is False the code is 0, and the columns still to come make
            up for that, too (as in SparseGPT's joint pruning, arXiv 2301.00774). None: all.

    Returns:
        Integer-valued float32 codes (G, O, K) in ``-2**(bits-1) .. 2**(bits-1)-1``.
    """
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    columns = weight.shape[2]
    order = covariance.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)  # (G, K)
    # Columns first, so that each one lies together in memory.
    rest = weight.transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, weight.shape[1]))
    factor = feedback_factor(damped(covariance, damping), order)
    if keep is not None:
        keep = keep.transpose(1, 2).gather(1, order[:, :, None].expand_as(rest))
    codes = torch.empty_like(rest)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty_like(rest[:, start:end])
        for i in range(start, end):
            code = torch.round(rest[:, i] / scale).clamp_(lowest, highest)
            if keep is not None:
                code *= keep[:, i]
            codes[:, i] = code
            error = (rest[:, i] - code * scale) / factor[:, i, i, None]
            errors[:, i - start] = error
            rest[:, i + 1 : end] -= factor[:, i, i + 1 : end, None] * error[:, None]
        rest[:, end:] -= factor[:, start:end, end:].transpose(1, 2) @ errors
    back = order.argsort(dim=1)[:, :, None].expand_as(codes)
    return codes.gather(1, back).transpose(1, 2)
