"""What a network costs at any widths of its groups: multiply-adds, parameters, or time.

A cost is a sum of terms, each a function of a few widths. A width is the length that a stretch of
an axis has left; where two groups share the axis (heads and their channels), it is the sum over
cells of the product of what each leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deploykit.prune.structured_groups import AxisKey, Group, axis_keys

__all__ = ["Cost", "Layer", "Term", "Width", "Widths", "mac_terms", "parameter_terms"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Width:
    """A length as a function of the share each group keeps.

    Attributes:
        cells: (positions, indices of the groups that all cover them).
    """

    cells: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def groups(self) -> frozenset[int]:
        return frozenset(g for _, groups in self.cells for g in groups)

    def at(self, shares: Floats) -> Floats:
        """Lengths for shares (..., groups), float64 (...)."""
        total = np.zeros(shares.shape[:-1])
        for count, groups in self.cells:
            total = total + count * shares[..., list(groups)].prod(-1)
        return total


class Widths:
    """The widths of every axis that some group covers."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self._covering: dict[AxisKey, dict[int, Tensor]] = {}
        for key, index, part in axis_keys(groups):
            length = part.value.shape[part.axis]
            axis = self._covering.setdefault(key, {})
            mask = axis.setdefault(index, torch.zeros(length, dtype=torch.bool))
            mask[part.position] = True

    def of(
        self, owner: nn.Module, tensor: str, axis: int, start: int = 0, end: int | None = None
    ) -> Width:
        """The width of positions ``start`` to ``end`` of an axis."""
        length = getattr(owner, tensor).shape[axis]
        covering = self._covering.get((owner, tensor, axis), {})
        code = torch.zeros(length, dtype=torch.long)
        indices = list(covering)
        for bit, index in enumerate(indices):
            code += covering[index].long() << bit
        values, counts = code[start:end].unique(return_counts=True)
        return Width(
            tuple(
                (int(count), tuple(g for bit, g in enumerate(indices) if value >> bit & 1))
                for value, count in zip(values.tolist(), counts, strict=True)
            )
        )


@dataclass(frozen=True)
class Layer:
    """A layer or attention whose cost depends on widths.

    Attributes:
        kind: ``linear``, ``conv``, ``depthwise`` or ``attention``.
        fixed: linear: (tokens,); conv: (side in, side out, kernel, stride); attention: (windows,
            queries, keys).
        widths: (in, out); depthwise: (out,); attention: (all heads' query channels, all heads'
            value channels).
        heads: of attention.
        macs: multiply-adds per product of the widths (per unit of each width, for attention).
    """

    name: str
    kind: str
    fixed: tuple[int, ...]
    widths: tuple[Width, ...]
    macs: float
    heads: Width | None = None


class Term(Protocol):
    """One part of a cost."""

    @property
    def groups(self) -> frozenset[int]: ...

    def at(self, shares: Floats) -> Floats:
        """Costs for shares (..., groups), float64 (...)."""
        ...


@dataclass(frozen=True)
class Product:
    """A factor times widths."""

    factor: float
    widths: tuple[Width, ...]

    @property
    def groups(self) -> frozenset[int]:
        return frozenset(g for width in self.widths for g in width.groups)

    def at(self, shares: Floats) -> Floats:
        total: Floats = np.full(shares.shape[:-1], self.factor)
        for width in self.widths:
            total = total * width.at(shares)
        return total


class Cost:
    """A sum of terms, quick to ask what one group's widths would change."""

    def __init__(self, terms: Sequence[Term], groups: int) -> None:
        self.terms = tuple(terms)
        self.by_group = [[t for t in terms if g in t.groups] for g in range(groups)]

    def total(self, shares: Floats) -> float:
        return float(sum(term.at(shares) for term in self.terms))

    def touched(self, group: int, shares: Floats, options: Floats) -> Floats:
        """Cost of the terms a group takes part in, for each share of ``options`` (n,)."""
        table = np.repeat(shares[None], len(options), axis=0)
        table[:, group] = options
        total: Floats = np.zeros(len(options))
        for term in self.by_group[group]:
            total = total + term.at(table)
        return total


def mac_terms(layers: Sequence[Layer]) -> list[Term]:
    """Multiply-adds of layers and attention products, for one image."""
    terms: list[Term] = []
    for layer in layers:
        if layer.kind == "attention":
            terms += [Product(layer.macs, (width,)) for width in layer.widths]
        else:
            terms.append(Product(layer.macs, layer.widths))
    return terms


def parameter_terms(module: nn.Module, groups: Sequence[Group]) -> list[Term]:
    """Numbers of parameters of all tensors."""
    widths, terms = Widths(groups), []
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            axes = tuple(widths.of(owner, name, axis) for axis in range(parameter.ndim))
            terms.append(Product(1.0, axes))
    found: list[Term] = [*terms]
    return found
