"""Multiply-adds of a network."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs"]


def count_macs(module: nn.Module, size: int) -> int:
    """Half of torch's FLOP count, for one (3, size, size) image; attention's products are in it.

    The module is run once.
    """
    # Fused attention on a CPU is one operator that torch doesn't count.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, size, size))
    return int(counter.get_total_flops()) // 2
