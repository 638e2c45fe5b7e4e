"""Groups are tried before they are trusted.

A few units of every group are taken away from a copy of the network. It must still run, and where
a unit can be silenced instead (its outgoing weights set to zero) both must answer alike. A
group that fails is left out, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.errors import one_line
from deploykit.prune.structured_groups import Group, remove_units

__all__ = ["reliable_groups", "silence"]

_TOLERANCE = 1e-3  # of the largest output; random networks are less smooth than trained ones
_STATISTICS = (nn.LayerNorm, nn.GroupNorm)


def reliable_groups(
    module: nn.Module, groups: Sequence[Group], example: Tensor, round_to: int
) -> tuple[list[Group], dict[str, str]]:
    """The groups that can be relied on, and why the others can't.

    Args:
        module: in eval mode, the groups' own; left as it was.
        example: float32 (1, 3, S, S); only its shape counts.
    """
    image = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    if not _failure(module, groups, image, round_to):
        return list(groups), {}
    good: list[Group] = []
    declined: dict[str, str] = {}
    for group in groups:
        failure = _failure(module, [group], image, round_to)
        if failure:
            declined[group.key] = failure
        else:
            good.append(group)
    # Each works alone; together they must as well, or the coupled ones go first.
    for kind in ("embedding", "conv", "mlp", "v", "qk", "heads"):
        failure = _failure(module, good, image, round_to)
        if not failure:
            break
        declined |= {g.key: f"not together with others: {failure}" for g in good if g.kind == kind}
        good = [g for g in good if g.kind != kind]
    return good, declined


def _failure(module: nn.Module, groups: Sequence[Group], image: Tensor, round_to: int) -> str:
    """Why a trial of the groups fails, or "". Peak memory: two copies of the network."""
    kept = {}
    for group in groups:
        mask = torch.ones(group.units, dtype=torch.bool)
        gone = min(group.step or round_to, group.units - 1)
        # From the middle: neighbours of both ends show a wrong offset.
        mask[group.units // 2 - gone // 2 :][:gone] = False
        kept[group.key] = mask
    pruned, its_groups = copy.deepcopy((module, list(groups)))
    try:
        remove_units(its_groups, kept)
        with torch.no_grad():
            result = pruned(image)
    except Exception as error:  # shapes that don't fit raise anything
        return f"the network doesn't run without them: {one_line(error, 120)}"
    comparable = [group for group in groups if _can_be_silenced(group)]
    if len(comparable) < len(groups):
        return ""  # norms over the residual stream see fewer channels: answers differ
    quiet, its_groups = copy.deepcopy((module, list(groups)))
    silence(its_groups, kept)
    with torch.no_grad():
        expected = quiet(image)
    difference = (result - expected).abs().max()
    if not bool(difference <= _TOLERANCE * expected.abs().max() + 1e-6):
        return "the network answers otherwise than with the channels silenced"
    return ""


def _can_be_silenced(group: Group) -> bool:
    """Whether nothing but the group's own weights sees its channels."""
    if group.kind == "embedding":
        return False
    return not any(isinstance(part.owner, _STATISTICS) for part in group.slices)


def silence(groups: Sequence[Group], kept: dict[str, Tensor]) -> None:
    """Set to zero what reads the units that aren't kept, in place.

    Where nothing reads them but a product of the group itself (queries and keys), what writes
    them is set to zero.
    """
    for group in groups:
        reads = [p for p in group.slices if not p.produces and p.axis == 1 and p.value.ndim > 1]
        for part in reads or group.slices:
            gone = part.position[~kept[group.key][part.unit]]
            with torch.no_grad():
                part.value.index_fill_(part.axis, gone, 0.0)
