"""Logits of several class-wise models made comparable: one scale and one offset for each.

A model that was pruned for some classes has logits of its own size, and never learnt to be quiet
about images of the others' classes. Fitted on images with labels (or on the original's answers):
the most likely ``scale[p] * logits + offset[p]``, under a softmax over all classes (Platt scaling
of J. Platt 1999 and temperature scaling of C. Guo et al. 2017, one pair a model). It stands for the
fusion network of X. Liu et al., "ED-ViT: Splitting Vision Transformer for Distributed Inference on
Edge Devices", 2024, section IV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Fusion", "fit_fusion"]

_RIDGE = 1e-4  # towards scale 1 and offset 0, so that few images can't run away with it
_STEPS = 100


@dataclass(frozen=True)
class Fusion:
    """How the parts' logits become those of all classes.

    Attributes:
        classes: of each part; together every class once.
        scales, offsets: of each part.
    """

    classes: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]

    def __call__(self, logits: Sequence[Tensor]) -> Tensor:
        """Logits (N, all classes) from those of each part, (N, its classes)."""
        result = logits[0].new_full((len(logits[0]), sum(map(len, self.classes))), -torch.inf)
        for part, classes, scale, offset in zip(
            logits, self.classes, self.scales, self.offsets, strict=True
        ):
            result[:, list(classes)] = part * scale + offset
        return result


def fit_fusion(
    classes: Sequence[Sequence[int]], logits: Sequence[Tensor], labels: Tensor
) -> Fusion:
    """Scales and offsets by maximum likelihood, from scale 1 and offset 0.

    Args:
        classes: of each part; together 0 to C-1, each once.
        logits: of each part, float32 (N, its classes).
        labels: int64 (N,), of all classes.
    """
    order = torch.tensor([c for part in classes for c in part])
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))  # class to column of the joined logits
    sizes = torch.tensor([len(part) for part in classes])
    joined = torch.cat([part.double() for part in logits], dim=1)
    wanted = place[labels]
    log_scale = torch.zeros(len(sizes), dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(len(sizes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [log_scale, offset], max_iter=_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        columns = log_scale.exp().repeat_interleave(sizes), offset.repeat_interleave(sizes)
        value = F.cross_entropy(joined * columns[0] + columns[1], wanted)
        value = value + _RIDGE * (log_scale.square().sum() + offset.square().sum())
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return Fusion(
        tuple(tuple(part) for part in classes),
        tuple(log_scale.detach().exp().tolist()),
        tuple(offset.detach().tolist()),
    )
