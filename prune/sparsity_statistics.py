"""What sparsification must know of a layer's inputs: their mean, norms and Gram matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx

from deploykit.errors import DeploykitError
from deploykit.graph.edit import layer_name
from deploykit.graph.layer_rows import LayerShape, input_rows

__all__ = ["InputStatistics", "Needs"]

Needs = Literal["nothing", "norms", "gram"]

_ROW_BYTES = 2**27  # of unfolded inputs at a time: a convolution's are many times its input


class InputStatistics:
    """Sums over the input vectors of a linear layer or ungrouped convolution, batch by batch.

    A convolution's input vectors are the unfolded patches it reads. Memory is ``K`` or ``K * K``
    floats whatever the number of images; columns are in the order of ``to_matrix``.

    Attributes:
        rows: how many input vectors were seen.
    """

    def __init__(self, node: fx.Node, weight: Tensor, *, gram: bool) -> None:
        """
        Args:
            node: the layer.
            weight: its weight (out, in, *kernel).
            gram: keep the Gram matrix; else only the norms.
        """
        self._node, self._shape = node, LayerShape.of(node, weight)
        columns = self._shape.inputs
        self._order = torch.arange(columns).reshape(weight.shape[1], -1).t().flatten()
        self.rows = 0
        self._mean_sum = torch.zeros(columns, dtype=torch.float64)
        self._squares = torch.zeros(columns, dtype=torch.float64)
        self._gram = torch.zeros(columns, columns) if gram else None

    def update(self, args: Any) -> None:
        """Add what the layer reads; ``args`` are its evaluated arguments."""
        x = args[0]
        per_image = max(self._image_bytes(args), 1)
        step = max(_ROW_BYTES // per_image, 1) if x.ndim > 2 else len(x)
        for part in x.split(step):
            rows = input_rows(self._node, [part, *args[1:]], self._shape)[0].float()
            self.rows += len(rows)
            self._mean_sum += rows.sum(0, dtype=torch.float64)
            self._squares += rows.square().sum(0, dtype=torch.float64)
            if self._gram is not None:
                self._gram.addmm_(rows.t(), rows)

    def _image_bytes(self, args: Any) -> int:
        """Of one image's unfolded inputs."""
        return int(4 * args[1].shape[2:].numel() * args[0][:1].numel())

    def check(self) -> None:
        """
        Raises:
            DeploykitError: the layer reads values that aren't finite.
        """
        if not torch.isfinite(self._squares).all():
            name = layer_name(self._node)
            message = f"{name} reads values that aren't finite on the calibration images"
            raise DeploykitError(message)

    @property
    def mean(self) -> Tensor:
        """Of the input vectors, float64 (K,)."""
        return (self._mean_sum / self.rows)[self._order]

    @property
    def squares(self) -> Tensor:
        """Mean square of every input, float64 (K,)."""
        return (self._squares / self.rows)[self._order]

    def gram(self, *, centred: bool) -> Tensor:
        """Mean of ``x x^T``, or of ``(x - mean)(x - mean)^T``, float32 (K, K)."""
        assert self._gram is not None
        result = (self._gram / self.rows)[self._order][:, self._order]
        if centred:
            mean = self.mean.float()
            result -= mean[:, None] * mean[None, :]
        return result
