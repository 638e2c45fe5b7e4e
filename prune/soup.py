"""Model soups: several recoveries of one student, averaged into a single model of the same cost.

Wortsman et al., "Model soups" (ICML 2022). All must have started from the same weights, or their
average means nothing; and averages are made before quantisation (and before quantisation-aware
training), since an average of codes is no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.types import PassRecord

__all__ = ["soup"]

_MASKED = 0.25


def soup(
    ingredients: Sequence[CapturedModel],
    mode: Literal["uniform", "greedy"],
    score: Callable[[CapturedModel], float] | None = None,
) -> tuple[CapturedModel, PassRecord]:
    """Average models that were recovered from one student.

    ``uniform`` averages all of them. ``greedy`` starts with the best and takes in the next best
    where the average then is at least as good: never worse than the best ingredient (the paper's
    algorithm 1). Integer tensors must be equal; zeros of masks stay.

    Args:
        ingredients: left unchanged; the same graph with other weights.
        score: the higher the better, on held-out images; needed for ``greedy``.

    Raises:
        UsageError: none, or models of other structure, other shapes or other masks; ``greedy``
            without a score.
    """
    if not ingredients:
        raise UsageError("soup: no models to average")
    tables = [_tensors(model.graph_module) for model in ingredients]
    for number, model in enumerate(ingredients[1:], start=1):
        _check_alike(ingredients[0], model, tables[0], tables[number], number)
    if mode == "uniform":
        record = PassRecord(
            name="soup",
            summary=f"uniform average of {len(tables)} recoveries",
            details={"taken": list(range(len(tables)))},
        )
        return _mean(ingredients[0], tables), record
    if score is None:
        raise UsageError("soup: greedy needs a score on held-out images")
    return _greedy(ingredients, tables, score)


def _greedy(
    ingredients: Sequence[CapturedModel],
    tables: Sequence[Mapping[str, Tensor]],
    score: Callable[[CapturedModel], float],
) -> tuple[CapturedModel, PassRecord]:
    scores = [score(model) for model in ingredients]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    taken, best = [order[0]], scores[order[0]]
    result = ingredients[order[0]].copy()
    for number in order[1:]:
        tried = _mean(ingredients[0], [tables[i] for i in (*taken, number)])
        reached = score(tried)
        if reached >= best:
            taken, best, result = [*taken, number], reached, tried
    record = PassRecord(
        name="soup",
        summary=(
            f"greedy average of {len(taken)} of {len(scores)} recoveries: held-out score "
            f"{max(scores):.4g} → {best:.4g}"
        ),
        details={"taken": taken, "scores": scores, "score": best},
    )
    return result, record


@torch.no_grad()
def _mean(model: CapturedModel, tables: Sequence[Mapping[str, Tensor]]) -> CapturedModel:
    """A copy of ``model`` with the tables' mean, one tensor at a time in float64."""
    result = model.copy()
    for name, tensor in _tensors(result.graph_module).items():
        if tensor.is_floating_point():
            total = torch.zeros_like(tensor, dtype=torch.float64)
            for table in tables:
                total += table[name]
            tensor.copy_(total / len(tables))
    return result


def _tensors(graph_module: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor of the graph by name; the tensors themselves."""
    named = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _check_alike(
    model: CapturedModel,
    other: CapturedModel,
    mine: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    number: int,
) -> None:
    what = f"soup: model {number} is no recovery of the same student"
    if _structure(model.graph_module) != _structure(other.graph_module):
        raise UsageError(f"{what}: its graph differs")
    for name, tensor in mine.items():
        if name not in theirs or theirs[name].shape != tensor.shape:
            raise UsageError(f"{what}: {name} has another shape, or is missing")
        if not tensor.is_floating_point():
            if not torch.equal(tensor, theirs[name]):
                raise UsageError(f"{what}: {name} differs")
            continue
        zeros = tensor == 0, theirs[name] == 0
        shares = [float(z.float().mean()) for z in zeros]
        if tensor.ndim > 1 and max(shares) >= _MASKED and not torch.equal(*zeros):
            raise UsageError(f"{what}: the zeros of {name} lie elsewhere")


def _structure(graph_module: fx.GraphModule) -> list[str]:
    return [node.format_node() or "output" for node in graph_module.graph.nodes]
