"""Scores that need gradients, without labels.

Cross-entropy with the network's own soft predictions has no gradient at all, and with its own
hard predictions it looks only at how far each image is from certainty. What pruning should keep
is the network's answer, so the change that counts is ``KL(answers before | answers after)``. Its
first order vanishes too; its second order is the Fisher matrix, the covariance of gradients

    J^T u,  u = sqrt(p) * e - p * sum(sqrt(p) * e),  e standard normal,

as ``E[u u^T] = diag(p) - p p^T``, the Hessian of the KL in the logits. A draw of ``u`` for each
image is one backward pass, needs no label, and gradients of different images don't correlate, so
those of a batch may be summed.

Feature maps have no answer. What pruning should keep there is every value of theirs: the change
that counts is half their squared error, whose Hessian in them is the identity, and u = e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from deploykit.prune.importance import Importance, unit_scores
from deploykit.prune.structured_groups import Group

__all__ = ["map_vector", "measured_scores", "score_vector"]

_AT_ONCE = 8  # images a backward pass: more passes are more draws of what is squared


def score_vector(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A random gradient for logits (N, classes), of covariance ``diag(p) - p p^T`` in each row."""
    p = logits.detach().softmax(-1)
    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    root = p.sqrt()
    return root * noise - p * (root * noise).sum(-1, keepdim=True)


def map_vector(maps: Tensor, generator: torch.Generator) -> Tensor:
    """A random gradient for joined feature maps (N, total), of covariance 1."""
    return torch.randn(maps.shape, generator=generator, dtype=maps.dtype)


def measured_scores(
    module: nn.Module,
    groups: Sequence[Group],
    importance: Importance,
    batches: Callable[[], Iterable[Tensor]],
    images: int,
    *,
    seed: int = 0,
    advance: Callable[[float], None] = lambda _: None,
    draw: Callable[[Tensor, torch.Generator], Tensor] = score_vector,
) -> list[Tensor]:
    """Scores of all units, float64 (copies, units) for each group, averaged over images.

    Peak memory is that of a training step with eight images.

    Args:
        module: the groups' own, in eval mode; its gradients are used and then dropped.
        images: how many of the batches' images are read.
        draw: the random gradient of what the module gives.
    """
    if not importance.gradients:
        return unit_scores(groups, importance)
    generator = torch.Generator().manual_seed(seed)
    wanted = [(p, p.requires_grad) for p in module.parameters()]
    for parameter, _ in wanted:
        parameter.requires_grad_(parameter.is_floating_point())
    total = [torch.zeros(g.copies, g.units, dtype=torch.float64) for g in groups]
    seen = 0
    try:
        for batch in batches():
            for part in batch[: images - seen].split(_AT_ONCE):
                module.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    logits = module(part)
                    (logits * draw(logits, generator)).sum().backward()
                for sums, more in zip(total, unit_scores(groups, importance), strict=True):
                    sums += more
                seen += len(part)
                advance(len(part))
            if seen >= images:
                break
    finally:
        module.zero_grad(set_to_none=True)
        for parameter, before in wanted:
            parameter.requires_grad_(before)
    return [sums / max(seen, 1) for sums in total]
