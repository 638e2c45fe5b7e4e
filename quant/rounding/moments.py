"""Second moments of a layer's input and error: all that closed-form rounding needs to know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.layer_rows import LayerShape, input_rows, output_rows

__all__ = ["LayerMoments", "Moments"]


class Moments:
    """Means and covariances of a layer's inputs and of its output error, batch by batch.

    Memory is ``G K (K + O)`` floats whatever the number of images.

    Attributes:
        rows: how many input vectors were seen.
    """

    def __init__(self, shape: LayerShape) -> None:
        g, k, o = shape.groups, shape.inputs, shape.outputs
        self.shape = shape
        self.rows = 0
        self._xx = torch.zeros(g, k, k)
        self._xe = torch.zeros(g, k, o)
        self._x = torch.zeros(g, k, dtype=torch.float64)
        self._e = torch.zeros(g, o, dtype=torch.float64)

    def update(self, x: Tensor, e: Tensor) -> None:
        """Add rows: inputs (G, rows, K) and the output errors (G, rows, O) they come with."""
        self.rows += x.shape[1]
        self._xx += x.transpose(1, 2) @ x
        self._xe += x.transpose(1, 2) @ e
        self._x += x.sum(1, dtype=torch.float64)
        self._e += e.sum(1, dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.shape)
        both.rows = self.rows + other.rows
        for part in ("_xx", "_xe", "_x", "_e"):
            setattr(both, part, getattr(self, part) + getattr(other, part))
        return both

    @property
    def input_mean(self) -> Tensor:
        """(G, K), float32."""
        return (self._x / self.rows).float()

    @property
    def error_mean(self) -> Tensor:
        """(G, O), float32."""
        return (self._e / self.rows).float()

    def covariance(self) -> Tensor:
        """Of the input, (G, K, K)."""
        mean = self.input_mean
        return self._xx / self.rows - mean[:, :, None] * mean[:, None, :]

    def cross_covariance(self) -> Tensor:
        """Of the input with the output error, (G, K, O)."""
        return self._xe / self.rows - self.input_mean[:, :, None] * self.error_mean[:, None, :]


class LayerMoments:
    """A layer's moments in two halves, so that what one half suggests can be tried on the other.

    Each batch is split in the middle, between images.
    """

    def __init__(self, shape: LayerShape) -> None:
        self.halves = (Moments(shape), Moments(shape))

    def update(self, node: fx.Node, args: Any, error: Tensor) -> None:
        """Add a batch.

        Args:
            args: the layer's evaluated arguments; the first is its (quantised) input.
            error: what its output should be, less what it is with ``args``.
        """
        x, e = input_rows(node, args, self.shape), output_rows(node, error, self.shape)
        middle = x.shape[1] // 2
        for half, part in zip(self.halves, (slice(middle), slice(middle, None)), strict=True):
            half.update(x[:, part], e[:, part])

    @property
    def shape(self) -> LayerShape:
        return self.halves[0].shape

    def both(self) -> Moments:
        """Of all rows."""
        return self.halves[0] + self.halves[1]
