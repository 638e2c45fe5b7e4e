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

    Args:
        origin: (G, K), near the inputs' mean. Inputs are counted from there: the covariance of
            values that lie far from zero and hardly vary would be nothing but rounding.

    Attributes:
        rows: how many input vectors were seen.
    """

    def __init__(self, shape: LayerShape, origin: Tensor) -> None:
        g, k, o = shape.groups, shape.inputs, shape.outputs
        self.shape = shape
        self.origin = origin
        self.rows = 0
        self._xx = torch.zeros(g, k, k)
        self._xe = torch.zeros(g, k, o)
        self._x = torch.zeros(g, k, dtype=torch.float64)
        self._e = torch.zeros(g, o, dtype=torch.float64)

    def update(self, x: Tensor, e: Tensor) -> None:
        """Add rows: inputs (G, rows, K) and the output errors (G, rows, O) they come with."""
        self.rows += x.shape[1]
        x = x - self.origin[:, None]
        self._xx += x.transpose(1, 2) @ x
        self._xe += x.transpose(1, 2) @ e
        self._x += x.sum(1, dtype=torch.float64)
        self._e += e.sum(1, dtype=torch.float64)

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.shape, self.origin)
        both.rows = self.rows + other.rows
        for part in ("_xx", "_xe", "_x", "_e"):
            setattr(both, part, getattr(self, part) + getattr(other, part))
        return both

    @property
    def input_mean(self) -> Tensor:
        """(G, K), float32."""
        return self.origin + self._offset

    @property
    def error_mean(self) -> Tensor:
        """(G, O), float32."""
        return (self._e / max(self.rows, 1)).float()

    @property
    def _offset(self) -> Tensor:
        """Of the inputs' mean from the origin, (G, K); 0 where nothing was seen."""
        return (self._x / max(self.rows, 1)).float()

    def covariance(self) -> Tensor:
        """Of the input, (G, K, K)."""
        offset = self._offset
        return self._xx / max(self.rows, 1) - offset[:, :, None] * offset[:, None, :]

    def cross_covariance(self) -> Tensor:
        """Of the input with the output error, (G, K, O)."""
        expected = self._offset[:, :, None] * self.error_mean[:, None, :]
        return self._xe / max(self.rows, 1) - expected


class LayerMoments:
    """A layer's moments in two halves, so that what one half suggests can be tried on the other.

    Each batch is split in the middle, between images.
    """

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        self._halves: tuple[Moments, Moments] | None = None

    def update(self, node: fx.Node, args: Any, error: Tensor) -> None:
        """Add a batch.

        Args:
            args: the layer's evaluated arguments; the first is its (quantised) input.
            error: what its output should be, less what it is with ``args``.
        """
        x, e = input_rows(node, args, self.shape), output_rows(node, error, self.shape)
        if self._halves is None:
            origin = x.mean(1)
            self._halves = (Moments(self.shape, origin), Moments(self.shape, origin))
        middle = x.shape[1] // 2
        for half, part in zip(self._halves, (slice(middle), slice(middle, None)), strict=True):
            half.update(x[:, part], e[:, part])

    @property
    def halves(self) -> tuple[Moments, Moments]:
        """Of the first rows of every batch, and of the rest."""
        assert self._halves is not None, "no batch was seen"
        return self._halves

    def both(self) -> Moments:
        """Of all rows."""
        first, second = self.halves
        return first + second
