"""Images made up, for what needs images but not what is on them."""

from __future__ import annotations

import torch
from torch import Tensor

from deploykit.types import Preprocessing

__all__ = ["synthetic_images"]


def synthetic_images(count: int, preprocessing: Preprocessing, seed: int) -> Tensor:
    """Colour noise with the 1/f amplitude spectrum of photographs, float32 (count, 3, S, S).

    Photographs' energy falls with spatial frequency and their channels go together; white noise
    shares neither, and gives ranges far from those of real images. Values are normalised as real
    images would be. Depends on the arguments alone.
    """
    size = preprocessing.size
    generator = torch.Generator().manual_seed(seed)
    rows = torch.fft.fftfreq(size)[:, None]
    columns = torch.fft.rfftfreq(size)[None, :]
    amplitude = (rows**2 + columns**2).sqrt().clamp(min=1.0 / size).reciprocal()
    # brightness, and two opponent colours that carry a tenth of its energy
    mix = torch.tensor([[1.0, 0.3, 0.1], [1.0, 0.0, -0.2], [1.0, -0.3, 0.1]])
    mean = torch.tensor(preprocessing.mean)[:, None, None]
    std = torch.tensor(preprocessing.std)[:, None, None]
    images = torch.empty(count, 3, size, size)
    for i in range(count):  # one at a time: an FFT of all would take several times the memory
        white = torch.randn(3, size, size, generator=generator)
        plane = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(size, size))
        spread = plane.std(dim=(1, 2), keepdim=True, correction=0).clamp(min=1e-6)
        plane = torch.einsum("cd,dhw->chw", mix, plane / spread)
        level, contrast = torch.rand(2, generator=generator)
        image = (0.3 + 0.4 * level) + (0.1 + 0.2 * contrast) * plane
        images[i] = (image.clamp(0, 1) - mean) / std
    return images
