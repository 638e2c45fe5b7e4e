"""2:4 sparsity by magnitude: of every four consecutive inputs the two smallest weights go.

Zeros of this pattern are what NVIDIA's sparse tensor cores (Ampere and later) can skip. No CPU
runtime and no file format here gains anything from them, and without recovery training the
accuracy falls; the report shows by how much.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from deploykit.types import PassRecord

__all__ = ["mask_2_4", "sparsify_2_4"]


def mask_2_4(weight: Tensor) -> Tensor:
    """Which weights to keep: the two largest magnitudes of each four consecutive inputs.

    Args:
        weight: (out, in, ...), ``in`` divisible by 4; groups run along ``in``, as NVIDIA's ASP
            groups them.

    Returns:
        bool mask of the same shape, exactly two True in every group. Ties keep the first.
    """
    moved = weight.abs().movedim(1, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, 4)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return keep.reshape(moved.shape).movedim(-1, 1)


def sparsify_2_4(module: nn.Module) -> tuple[nn.Module, PassRecord]:
    """A copy of ``module`` with every eligible linear and convolution weight made 2:4 sparse.

    Eligible are ungrouped layers with outputs divisible by 8 and inputs by 16 (the rule of
    NVIDIA's ASP); the record lists the others with the reason.
    """
    pruned = copy.deepcopy(module)
    total = masked = 0
    declined = {}
    for name, layer in pruned.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        weight = layer.weight
        total += weight.numel()
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            declined[name] = "grouped convolution"
        elif weight.shape[0] % 8 or weight.shape[1] % 16:
            declined[name] = f"{weight.shape[1]} inputs, {weight.shape[0]} outputs: not / 16, / 8"
        else:
            with torch.no_grad():
                weight.mul_(mask_2_4(weight))
            masked += weight.numel()
    share = 100 * masked / total if total else 0.0
    record = PassRecord(
        name="sparsify_2_4",
        summary=f"{share:.0f} % of the weights are in 2:4 layers (magnitude, no recovery)",
        details={"declined": declined, "gains_on": "NVIDIA sparse tensor cores only"},
    )
    return pruned, record
