"""The state-space recurrence of Mamba in a number of steps that is the logarithm of its length.

Gu and Dao, *Mamba: Linear-Time Sequence Modeling with Selective State Spaces* (2023), eq. 2 and
section 3.3.2: the recurrence ``h_t = a_t h_(t-1) + b_t`` is a prefix sum of pairs under
``(a, b) ∘ (a', b') = (a a', a' b + b')``. It is summed here by doubling (Hillis and Steele,
*Data parallel algorithms*, 1986): slices, products and sums only, so that it exports.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_scan_parameters", "linear_recurrence", "selective_scan"]


def linear_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """``h_t = a_t h_(t-1) + b_t`` from ``h_(-1) = 0`` over the last axis.

    ``a`` and ``b``: float32 (..., L) of one shape; gives (..., L). The length is fixed when the
    graph is captured.
    """
    length, reach = b.shape[-1], 1
    decay = a[..., 1:]  # decay[t] takes the state from t - reach to t, for t >= reach
    state = b
    while reach < length:
        carried = state[..., reach:] + decay * state[..., :-reach]
        state = torch.cat((state[..., :reach], carried), dim=-1)
        decay = decay[..., reach:] * decay[..., :-reach]
        reach *= 2
    return state


def selective_scan(x: Tensor, step: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Selective state space (Mamba, algorithm 2; zero-order hold of A, Euler's rule for B).

    Args:
        x: input, float32 (N, K, D, L): K independent scans of D channels.
        step: positive step sizes, (N, K, D, L).
        a: negative decay rates, (K, D, S), S being the size of the state.
        b: input weights, (N, K, S, L).
        c: output weights, (N, K, S, L).
        d: weights of the skip, (K, D).

    Returns:
        (N, K, D, L).
    """
    decay = torch.exp(step.unsqueeze(3) * a.unsqueeze(-1))
    drive = (step * x).unsqueeze(3) * b.unsqueeze(2)
    state = linear_recurrence(decay, drive)
    return (state * c.unsqueeze(2)).sum(3) + d.unsqueeze(-1) * x


def draw_scan_parameters(
    x_proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, a_logs: Tensor
) -> None:
    """Draw a scan's parameters in place as Mamba does (section 3.6 and appendix E.2).

    Steps are log-uniform between 0.001 and 0.1 (through the inverse of softplus), decay rates
    1, 2 … S. Shapes: x_proj (K, R + 2S, D), dt_weight (K, D, R), dt_bias (K, D), a_logs (KD, S).
    """
    with torch.no_grad():
        x_proj.uniform_(-1, 1).mul_(x_proj.shape[-1] ** -0.5)
        dt_weight.uniform_(-1, 1).mul_(dt_weight.shape[-1] ** -0.5)
        step = torch.empty_like(dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
        dt_bias.copy_(step + torch.log(-torch.expm1(-step)))
        rates = torch.arange(1, a_logs.shape[-1] + 1, dtype=a_logs.dtype, device=a_logs.device)
        a_logs.copy_(rates.log().expand_as(a_logs))
