"""How much a unit of channels matters. One small class a kind, found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from deploykit.errors import UsageError
from deploykit.prune.structured_groups import Group

__all__ = ["IMPORTANCES", "Importance", "find_importance", "register_importance", "unit_scores"]

Value = Callable[[Tensor, Tensor | None], Tensor]


class Importance(Protocol):
    """Scores every weight; the sums over a group's units are then made the units' scores."""

    gradients: bool
    """Whether it needs gradients; else it is computed once, from the weights of layers."""

    fairness: Literal["kind", "layer", "none"]
    """What its scores are best compared within: ``layer``, ``kind``, or everywhere: ``none``."""

    def of_weights(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """What is summed over a unit, of the weight's shape."""
        ...

    def of_sums(self, sums: Tensor) -> Tensor:
        """Non-negative scores of units from their sums (of one batch, if it needs gradients)."""
        ...


IMPORTANCES: dict[str, Importance] = {}


def register_importance(name: str) -> Callable[[type[Importance]], type[Importance]]:
    """Register an importance under the name that options give."""

    def add(kind: type[Importance]) -> type[Importance]:
        IMPORTANCES[name] = kind()
        return kind

    return add


def find_importance(name: str) -> Importance:
    """The importance of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in IMPORTANCES:
        raise UsageError(f"no importance {name!r}; there are {', '.join(sorted(IMPORTANCES))}")
    return IMPORTANCES[name]


@register_importance("magnitude")
class Magnitude:
    """Sum of the squares of all weights of a unit (group L2)."""

    gradients = False
    fairness: Literal["kind", "layer", "none"] = "layer"

    def of_weights(self, weight: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        return weight.square()

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums


@register_importance("dimap")
class LayerAdaptiveMagnitude:
    """Each weight's square against all at least as large ones of its layer (LAMP).

    ``w² / Σ_{|w_i| >= |w|} w_i²`` says what share of what would be left the weight is, so that
    layers can be ranked jointly. Source: Lee et al., Layer-Adaptive Sparsity for the
    Magnitude-based Pruning (ICLR 2021); used module by module in DIMAP.
    """

    gradients = False
    fairness: Literal["kind", "layer", "none"] = "layer"

    def of_weights(self, weight: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        squares, order = weight.double().square().flatten().sort(descending=True, stable=True)
        # Equal magnitudes see the same sum: that at the last of them.
        total = squares.cumsum(0)
        last = torch.searchsorted(-squares, -squares, right=True) - 1
        ratio = torch.where(squares > 0, squares / total[last].clamp_min(1e-300), 0.0)
        return torch.empty_like(ratio).scatter_(0, order, ratio).reshape(weight.shape)

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums


@register_importance("taylor")
class Taylor:
    """Size of the first-order change of the loss, ``|Σ w g|``, summed over batches.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning (CVPR 2019).
    """

    gradients = True
    fairness: Literal["kind", "layer", "none"] = "kind"

    def of_weights(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return weight * gradient

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums.abs()


@register_importance("hessian")
class Hessian(Taylor):
    """``(Σ w g)²`` of each group, summed over batches.

    With gradients whose covariance is the Fisher matrix (``importance_gradients``) this is the
    second-order change of the KL divergence when the unit goes.
    Source: Yang et al., NViT / Global Vision Transformer Pruning with Hessian-Aware Saliency
    (CVPR 2023).
    """

    fairness: Literal["kind", "layer", "none"] = (
        "none"  # its unit is the same everywhere: nats of divergence
    )

    def of_sums(self, sums: Tensor) -> Tensor:
        return sums.square()


def unit_scores(groups: Sequence[Group], importance: Importance) -> list[Tensor]:
    """Scores of all units, float64 (copies, units) for each group, from the weights as they are.

    Tensors without a gradient count nothing where the importance needs one. Without gradients
    only weights of layers (two axes and more) count: a norm's scale isn't of their size.
    """
    cached: dict[tuple[object, str], Tensor] = {}
    found = []
    for group in groups:
        sums = torch.zeros(group.copies * group.units, dtype=torch.float64)
        for part in group.slices:
            value = part.value
            if not part.scored or not (importance.gradients or value.ndim > 1):
                continue
            gradient = value.grad if importance.gradients else None
            if importance.gradients and gradient is None:
                continue
            key = (part.owner, part.tensor)
            if key not in cached:
                cached[key] = importance.of_weights(value.detach(), gradient)
            element = cached[key]
            along = element.transpose(0, part.axis).reshape(element.shape[part.axis], -1)
            per_position = along.sum(1, dtype=torch.float64)
            sums.index_add_(
                0, part.copy_numbers * group.units + part.unit, per_position[part.position]
            )
        found.append(importance.of_sums(sums.reshape(group.copies, group.units)))
    return found
