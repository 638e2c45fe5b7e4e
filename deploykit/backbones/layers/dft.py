"""The two-dimensional real Fourier transform as products with constant matrices.

ONNX's DFT operator is young and most runtimes lack it; a product with a constant matrix runs
everywhere, and on maps of 7 to 56 pixels it is cheap. Real arithmetic only: a complex number is
a pair of tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["RealFourier2d"]


class RealFourier2d(nn.Module):
    """The transform and its inverse for one size of map, float32.

    Rows are multiplied by one matrix, columns by another. The half spectrum of a real map
    determines the rest, so that on the way back a column inside of it counts twice, and the
    imaginary parts of the others don't count.
    """

    cos_w: Tensor
    sin_w: Tensor
    cos_h: Tensor
    sin_h: Tensor
    back_cos_w: Tensor
    back_sin_w: Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        half = width // 2 + 1
        columns, frequencies = torch.arange(width).double(), torch.arange(half).double()
        angle_w = 2 * math.pi / width * torch.outer(columns, frequencies)
        rows = torch.arange(height).double()
        angle_h = 2 * math.pi / height * torch.outer(rows, rows)
        counts = torch.full((half,), 2.0, dtype=torch.float64)
        counts[0] = 1.0
        if width % 2 == 0:
            counts[-1] = 1.0
        norm_w, norm_h = width**-0.5, height**-0.5
        tables = {
            "cos_w": angle_w.cos() * norm_w,
            "sin_w": angle_w.sin() * norm_w,
            "cos_h": angle_h.cos() * norm_h,
            "sin_h": angle_h.sin() * norm_h,
            "back_cos_w": (angle_w.cos() * counts).T * norm_w,
            "back_sin_w": (angle_w.sin() * counts).T * norm_w,
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float().contiguous(), persistent=False)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``rfft2(x, norm="ortho")`` of x (N, C, H, W): both parts, each (N, C, H, W // 2 + 1)."""
        # exp(-i a) = cos a - i sin a, over columns and then over rows
        real, imag = x @ self.cos_w, -(x @ self.sin_w)
        return self.cos_h @ real + self.sin_h @ imag, self.cos_h @ imag - self.sin_h @ real

    def inverse(self, real: Tensor, imag: Tensor) -> Tensor:
        """``irfft2(real + i imag, norm="ortho")``: what ``transform`` takes, from what it gives."""
        # exp(i a) over rows; then over columns, where only the real part is wanted
        real, imag = (
            self.cos_h @ real - self.sin_h @ imag,
            self.cos_h @ imag + self.sin_h @ real,
        )
        return real @ self.back_cos_w - imag @ self.back_sin_w
