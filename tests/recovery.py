"""What the tests of recovery share: images made here, damaged students, distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from deploykit.graph.capture import CapturedModel
from deploykit.prune.recover import RecoverOptions
from deploykit.prune.sparsity import SparsityOptions, sparsify
from tests.graphs import captured, tiny_cnn, tiny_vit

QUICK = RecoverOptions(epochs=4, lr=1e-3, batch_size=16, held_out=0.25, patience=100)


@cache
def vit() -> CapturedModel:
    return captured(tiny_vit())


@cache
def cnn() -> CapturedModel:
    return captured(tiny_cnn())


@cache
def sparse_vit() -> CapturedModel:
    return sparsify(captured(tiny_vit()), SparsityOptions())[0]


class Waves(Dataset[tuple[Tensor, int]]):
    """Smooth images, the same for an index; noise of torch's generator is their augmentation."""

    def __init__(self, count: int = 128, *, noisy: bool = True, labels: Tensor | None = None):
        coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(3))
        self.pixels = F.interpolate(coarse, 32, mode="bilinear")
        self.noisy, self.labels = noisy, labels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = 0.1 * torch.randn(3, 32, 32) if self.noisy else 0.0
        label = -1 if self.labels is None else int(self.labels[index])
        return self.pixels[index] + noise, label

    def evaluation(self) -> Waves:
        return Waves(len(self), noisy=False, labels=self.labels)


class Interrupt:
    """Progress that stops the run after some steps, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    @contextmanager
    def __call__(self, *_step: object) -> Iterator[Callable[[float], None]]:
        def advance(amount: float) -> None:
            self.left -= int(amount)
            if self.left <= 0:
                raise KeyboardInterrupt

        yield advance


def damaged(model: CapturedModel, noise: float = 0.3) -> CapturedModel:
    """A copy, each matrix with relative noise."""
    model = model.copy()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.graph_module.parameters():
            if parameter.ndim > 1:
                size = noise * parameter.std()
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def kl(student: CapturedModel, teacher: CapturedModel) -> float:
    """On images that no recovery here has seen."""
    coarse = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    batch = F.interpolate(coarse, 32, mode="bilinear")
    with torch.no_grad():
        logs = [m.graph_module(batch).log_softmax(1) for m in (student, teacher)]
    return float(F.kl_div(*logs, reduction="batchmean", log_target=True))


def weights(model: CapturedModel) -> dict[str, Tensor]:
    return model.graph_module.state_dict()


def same(first: CapturedModel, second: CapturedModel) -> bool:
    return all(torch.equal(weights(first)[k], v) for k, v in weights(second).items())
