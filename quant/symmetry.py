"""Grids around zero, for runtimes whose integer kernels know no zero point there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from torch import fx

from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer

__all__ = ["Symmetry", "symmetric_keys", "symmetric_uniform"]

Symmetry = Literal["none", "matmul", "all"]
"""Which activation grids lie around zero: none; the second factors of products of two
activations, at any width; or every grid of 8 bits (narrower codes less their zero point fit a
signed byte anyway)."""

Key = tuple[str, int]


def symmetric_uniform(quantizer: UniformQuantizer) -> UniformQuantizer:
    """The grid around zero, zero point ``2**(bits - 1)``, that reaches as far as the given one."""
    highest = 2**quantizer.bits - 1
    reach = max(quantizer.zero_point, highest - quantizer.zero_point)
    middle = 2 ** (quantizer.bits - 1)
    return UniformQuantizer(quantizer.scale * reach / (middle - 1), middle, quantizer.bits)


def symmetric_keys(
    symmetry: Symmetry,
    plans: Mapping[str, LayerPlan],
    nodes: Mapping[str, fx.Node],
    activations: Mapping[Key, FittedQuantizer],
) -> Iterable[Key]:
    """The (source node, bits) whose uniform grid has to lie around zero."""
    if symmetry == "all":
        return [key for key in activations if key[1] == 8]
    if symmetry == "matmul":
        second = [
            (nodes[name].args[1], plan.input_bits)
            for name, plan in plans.items()
            if plan.op == "matmul" and plan.input_bits != FLOAT
        ]
        return [(node.name, bits) for node, bits in second if isinstance(node, fx.Node)]
    return []
