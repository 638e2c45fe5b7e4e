"""What a unit's output error costs: plainly, or weighted by what it does to the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FisherLoss", "OutputLoss", "PlainLoss", "WeightedLoss", "output_gradient",
           "perturbation_hessian"]  # fmt: skip

PERTURBATION = 1e-2
FISHER_TEMPERATURE = 20.0


class OutputLoss(Protocol):
    def __call__(self, output: Tensor, wanted: Tensor, step: int) -> Tensor:
        """Loss of a batch of outputs (N, …); ``step`` counts iterations from 0."""
        ...


class PlainLoss:
    """Squared error summed over the channels, averaged over images and places (BRECQ)."""

    def __call__(self, output: Tensor, wanted: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return (output - wanted).square().sum() / _places(output)


class WeightedLoss:
    """Squared error, each element weighted by its importance to the logits (APHQ-ViT).

    Args:
        weight: one image's output shape, non-negative, of mean 1.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, output: Tensor, wanted: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return ((output - wanted).square() * self.weight).sum() / _places(output)


class FisherLoss:
    """FIMA-Q's low-rank plus diagonal approximation of the Fisher information.

    Snapshots of the mean absolute gradient ``g_i`` and error ``d_i`` are taken while the unit
    learns; ``L = a B^-1 a^T / init + (delta^2 · mean g) / init`` with ``a_i = |delta| · g_i`` and
    ``B = D D^T`` (arXiv 2506.11543).

    Args:
        gradient: mean absolute gradient of the logits' KL divergence at outputs (N, …), for
            given outputs of the same images as ``wanted``.
        rank: how many snapshots, k.
        every: iterations between two of them.
    """

    def __init__(self, gradient: Callable[[Tensor, Tensor], Tensor], rank: int, every: int) -> None:
        self.gradient, self.rank, self.every = gradient, rank, every
        self.gradients: list[Tensor] = []
        self.errors: list[Tensor] = []
        self.start: tuple[float, float] | None = None

    def __call__(self, output: Tensor, wanted: Tensor, step: int) -> Tensor:
        if step % self.every == 0 and len(self.gradients) < self.rank:
            self._snapshot(output.detach(), wanted)
        error = (output - wanted).abs().flatten(1)
        gradients = torch.stack(self.gradients)
        errors = torch.stack(self.errors)
        projections = error @ gradients.t()  # (N, k)
        gram = (errors @ errors.t()).double()
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(len(gram))
        solved = torch.linalg.solve(gram, projections.t().double()).t().float()
        low_rank = (projections * solved).sum(1).mean()
        diagonal = (error.square() * gradients.mean(0)).sum(1).mean()
        if self.start is None:
            self.start = (float(low_rank.detach()), float(diagonal.detach()))
            scale = float((output - wanted).detach().square().sum() / _places(output))
            self.scale = max(scale, 1e-12)
        first, second = (max(value, 1e-20) for value in self.start)
        # Both parts start at one; in the plain loss's units the rounding penalty keeps its weight.
        loss: Tensor = 0.5 * self.scale * (low_rank / first + diagonal / second)
        return loss

    def _snapshot(self, output: Tensor, wanted: Tensor) -> None:
        gradient = self.gradient(output, wanted).flatten()
        self.gradients.append(gradient / gradient.norm().clamp(min=1e-20))
        self.errors.append((output - wanted).abs().mean(0).flatten())


def output_gradient(suffix: Callable[[Tensor], Tensor], output: Tensor, logits: Tensor) -> Tensor:
    """Gradient of ``KL(float logits || suffix(output))`` at a unit's output, (N, …).

    Args:
        suffix: the float model from the unit's output to the logits.
        logits: the float model's, (N, classes).
    """
    probe = output.detach().requires_grad_(True)
    with torch.enable_grad():
        loss = F.kl_div(
            F.log_softmax(suffix(probe), 1), F.log_softmax(logits, 1),
            reduction="sum", log_target=True,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, probe)
    return gradient


def perturbation_hessian(
    suffix: Callable[[Tensor], Tensor], outputs: Tensor, logits: Tensor
) -> Tensor:
    """APHQ-ViT's average perturbation Hessian of one batch: ``mean (J(O+e) - J(O-e)) / 2e``.

    J is ``output_gradient`` (arXiv 2504.02508, eq. 8 to 10). The step e is ``PERTURBATION`` of the
    output's own spread: the paper's 1e-6 vanishes in float32.

    Returns:
        One image's output shape.
    """
    step = PERTURBATION * float(outputs.std())
    above = output_gradient(suffix, outputs + step, logits)
    below = output_gradient(suffix, outputs - step, logits)
    return ((above - below) / (2 * step)).mean(0)


def importance(hessian: Tensor) -> Tensor:
    """A Hessian as weights: its absolute value, of mean 1, no element below a hundredth."""
    weight = hessian.abs()
    return (weight / weight.mean().clamp(min=1e-30)).clamp(min=0.01)


def _places(output: Tensor) -> int:
    """Images times places; the channels are the last axis of tokens, the second of maps."""
    channels = output.shape[1] if output.ndim in (2, 4) else output.shape[-1]
    return output.numel() // channels
