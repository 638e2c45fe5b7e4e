"""Predicted time of a network at any widths, from a table measured on the target.

Every layer is measured alone at a few widths; between them times are interpolated. Layers of one
shape are measured once. What stands between layers (norms, additions) isn't in the prediction,
and kernels that a runtime fuses are counted one by one: predicted shares say which widths to
prefer, the file says how fast it is.

Source: the latency lookup table of NViT (Yang et al., CVPR 2023), with the target's own times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.interpolate import RegularGridInterpolator

from deploykit.errors import MeasurementError
from deploykit.prune.structured_cost import Floats, Layer, Term, Width

__all__ = ["LayerShape", "MeasureLayers", "latency_terms"]

_SHARES = (0.25, 0.5, 0.75, 1.0)
_SHARES_OF_THREE = (0.34, 0.67, 1.0)  # attention has three sizes: a coarser grid


@dataclass(frozen=True)
class LayerShape:
    """One layer to be timed, for a batch of one image.

    Attributes:
        kind: ``linear``, ``conv``, ``depthwise`` or ``attention``.
        fixed: linear: (tokens,); conv and depthwise: (side in, side out, kernel, stride);
            attention: (windows, queries, keys).
        sizes: linear and conv: (in, out channels); depthwise: (channels,); attention: (heads,
            query channels of a head, value channels of a head).
    """

    kind: str
    fixed: tuple[int, ...]
    sizes: tuple[int, ...]


MeasureLayers = Callable[[Sequence[LayerShape]], Sequence[float]]
"""Milliseconds of each of the layers on the target."""


@dataclass(frozen=True)
class _Table:
    """Times over a grid of sizes. Sizes that no group changes have no axis of their own."""

    layer: Layer
    grid: RegularGridInterpolator | None
    constant: float
    varying: tuple[int, ...]

    @property
    def groups(self) -> frozenset[int]:
        heads = frozenset() if self.layer.heads is None else self.layer.heads.groups
        return frozenset(g for width in self.layer.widths for g in width.groups) | heads

    def at(self, shares: Floats) -> Floats:
        shape = shares.shape[:-1]
        if self.grid is None:
            return np.full(shape, self.constant)
        sizes = _sizes(self.layer, shares)
        points = np.stack([sizes[axis] for axis in self.varying], axis=-1)
        found: Floats = np.maximum(self.grid(points.reshape(-1, len(self.varying))), 0.0)
        return found.reshape(shape)


def _sizes(layer: Layer, shares: Floats) -> list[Floats]:
    """The layer's sizes, in the order of ``LayerShape.sizes``."""
    widths = [width.at(shares) for width in layer.widths]
    if layer.kind != "attention":
        return widths
    heads = np.ones(shares.shape[:-1]) if layer.heads is None else layer.heads.at(shares)
    safe = np.maximum(heads, 1)
    return [heads, *(width / safe for width in widths)]


def _size_groups(layer: Layer) -> list[frozenset[int]]:
    if layer.kind != "attention":
        return [width.groups for width in layer.widths]
    heads: Width | None = layer.heads
    own = frozenset() if heads is None else heads.groups
    return [own, *(width.groups - own for width in layer.widths)]


def latency_terms(layers: Sequence[Layer], groups: int, measure: MeasureLayers) -> list[Term]:
    """A term for each layer, from one call of ``measure`` with all shapes that are needed.

    Raises:
        MeasurementError: a time is missing, not finite or not positive.
    """
    full = np.ones(groups)
    wanted: dict[LayerShape, float] = {}
    plans: list[tuple[Layer, tuple[int, ...], list[list[int]]]] = []
    for layer in layers:
        sizes = [int(size) for size in _sizes(layer, full)]
        varying = tuple(axis for axis, own in enumerate(_size_groups(layer)) if own)
        shares = _SHARES_OF_THREE if layer.kind == "attention" else _SHARES
        axes = [
            sorted({max(1, math.ceil(size * share)) for share in shares})
            if axis in varying
            else [size]
            for axis, size in enumerate(sizes)
        ]
        plans.append((layer, varying, axes))
        for point in product(*axes):
            wanted[LayerShape(layer.kind, layer.fixed, point)] = math.nan
    times = list(measure(list(wanted)))
    if len(times) != len(wanted) or not all(math.isfinite(ms) and ms > 0 for ms in times):
        raise MeasurementError(f"wanted a time for each of {len(wanted)} layers, got other figures")
    wanted = dict(zip(wanted, times, strict=True))
    return [_table(layer, varying, axes, wanted) for layer, varying, axes in plans]


def _table(
    layer: Layer,
    varying: tuple[int, ...],
    axes: list[list[int]],
    times: dict[LayerShape, float],
) -> Term:
    values = np.array([times[LayerShape(layer.kind, layer.fixed, p)] for p in product(*axes)])
    used = tuple(axis for axis in varying if len(axes[axis]) > 1)
    if not used:
        return _Table(layer, None, float(values[-1]), ())
    table = values.reshape([len(axes[axis]) for axis in used])
    grid = RegularGridInterpolator(
        [np.array(axes[axis], dtype=float) for axis in used], table,
        bounds_error=False, fill_value=None,
    )  # fmt: skip
    return _Table(layer, grid, 0.0, used)
