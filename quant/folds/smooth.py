"""SmoothQuant's candidate: wide activation channels hand part of their width to the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from deploykit.quant.folds.candidates import NormCandidate

__all__ = ["ALPHAS", "smooth_candidate"]

ALPHAS = (0.15, 0.5, 0.95)  # worth trying; which is best, and whether any is, varies by model
_MIN_RATIO = 1e-5


def smooth_candidate(
    low: Tensor, high: Tensor, weight_absmax: Tensor, alpha: float, shift: bool
) -> NormCandidate:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4).

    With ``shift``, every channel is first made symmetric by ``c_j = (max_j + min_j) / 2``
    (SQ-b of MPTQ-ViT, arXiv 2401.14895), so that a symmetric grid serves as well as one with a
    zero point.

    Args:
        low, high: (C,), least and greatest value of every channel.
        weight_absmax: (C,), largest absolute weight that reads the channel.
        alpha: 0 to 1; 1 gives all channels the same range.

    Returns:
        The candidate, ratio 1 where a channel or all its weights are zero. Its range has to be
        calibrated after the fold, or follows from ``(low + shift) / ratio`` and
        ``(high + shift) / ratio``.

    Raises:
        ValueError: ``alpha`` is outside 0 to 1, or a value isn't finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0 to 1, not {alpha}")
    low, high, weights = low.double(), high.double(), weight_absmax.double()
    if not all(bool(torch.isfinite(part).all()) for part in (low, high, weights)):
        raise ValueError("a channel's range or weights are not finite")
    move = -(high + low) / 2 if shift else torch.zeros_like(low)
    absmax = torch.maximum((low + move).abs(), (high + move).abs())
    ratio = absmax.pow(alpha) / weights.pow(1 - alpha)
    usable = (absmax > 0) & (weights > 0)
    ratio = torch.where(usable, ratio.clamp(min=_MIN_RATIO), 1.0)
    name = f"{'smooth-shift' if shift else 'smooth'}-{alpha:g}"
    return NormCandidate(name=name, ratio=ratio, shift=move)
