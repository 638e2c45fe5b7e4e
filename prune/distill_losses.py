"""What a student is taught by: each loss compares one kind of place in teacher and student."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from deploykit.prune.distill_taps import (
    Taps,
    attention_maps,
    block_outputs,
    embeddings,
    logits,
)

__all__ = ["LOSSES", "Lesson", "Loss", "register"]

_TINY = 1e-8


@dataclass(frozen=True)
class Lesson:
    """What losses may need beside the two values.

    Attributes:
        labels: int64 (N,), -1 where an image has none.
        temperature: of the softened logits.
    """

    labels: Tensor
    temperature: float


@dataclass(frozen=True)
class Loss:
    """A loss: where it looks, and how far the student is from the teacher there.

    Attributes:
        find: the places in a graph.
        compute: (student's value, teacher's value, lesson) to a scalar.
    """

    name: str
    find: Callable[[fx.Graph], Taps]
    compute: Callable[[Tensor, Tensor, Lesson], Tensor]


LOSSES: dict[str, Loss] = {}

_Compute = Callable[[Tensor, Tensor, Lesson], Tensor]


def register(name: str, find: Callable[[fx.Graph], Taps]) -> Callable[[_Compute], _Compute]:
    """Make a function a loss that options can name."""

    def add(compute: _Compute) -> _Compute:
        if name in LOSSES:
            raise ValueError(f"loss {name} is there already")
        LOSSES[name] = Loss(name, find, compute)
        return compute

    return add


@register("logits", logits)
def soft_logits(student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over images.

    Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", section 2: the factor
    keeps the gradients' size when the temperature changes.
    """
    warm = lesson.temperature
    target = F.log_softmax(teacher.float() / warm, dim=-1)
    guess = F.log_softmax(student.float() / warm, dim=-1)
    return warm**2 * F.kl_div(guess, target, reduction="batchmean", log_target=True)


@register("labels", logits)
def hard_labels(student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:  # noqa: ARG001
    """Cross entropy with the labels, mean over the images that have one; 0 without any."""
    known = lesson.labels >= 0
    total = F.cross_entropy(student.float(), lesson.labels, ignore_index=-1, reduction="sum")
    return total / known.sum().clamp(min=1)


@register("features", block_outputs)
def block_features(student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:  # noqa: ARG001
    """Squared error of a block's output against the teacher's variance, mean over images.

    Both are normalised by the teacher's mean and deviation over the whole image, so blocks with
    large values count as much as others. 1 is as bad as the teacher's mean everywhere.
    """
    mine, theirs = student.float().flatten(1), teacher.float().flatten(1)
    error = (mine - theirs).square().mean(1)
    return (error / theirs.var(1, correction=0).clamp(min=_TINY)).mean()


@register("embedding", embeddings)
def class_embedding(student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:
    """As ``features``, for what the classifier reads.

    It says more of an image than a few classes' logits do, and is there however many tokens or
    widths the blocks before it have lost. (FitNets, Romero et al., ICLR 2015, equation 3.)
    """
    return block_features(student, teacher, lesson)


@register("attention", attention_maps)
def attention_kl(student: Tensor, teacher: Tensor, lesson: Lesson) -> Tensor:  # noqa: ARG001
    """``KL(teacher || student)`` of attention maps, mean over images, heads and queries.

    Rows are distributions over keys. (MiniLM, equation 1, has the same divergence.)
    """
    mine, theirs = student.float(), teacher.float()
    logs = theirs.clamp(min=_TINY).log() - mine.clamp(min=_TINY).log()
    return torch.sum(theirs * logs, dim=-1).mean()
