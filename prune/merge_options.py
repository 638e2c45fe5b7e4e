"""What token merging can be asked for, and how many tokens each block then loses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deploykit.errors import UsageError

__all__ = ["SCHEDULES", "MergeOptions", "reductions", "register_schedule"]


@dataclass(frozen=True)
class MergeOptions:
    """How many tokens are merged, where, and by which score.

    Attributes:
        schedule: a registered schedule's name.
        r: tokens merged in a block (``constant``), or on the average of all (``decreasing``).
        per_layer: tokens merged in each block, for ``list``.
        ratio: share of a block's tokens that ``fast`` merges.
        scorer: a registered scorer's name: which tokens are alike.
        proportional_attention: later attentions count a merged token as often as tokens are in
            it. Right for weights trained with labels; ToMe leaves it out for MAE's.
        protect: how many tokens in front never merge; None finds it: those that are the same
            for every image (class, distillation, registers).
        place: ``stream`` merges for good, behind the attention; ``local`` merges in front of
            each MLP and copies back behind it, so that any layout of the tokens survives.
        least_tokens: fewer tokens than this aren't worth merging: the request is refused.
    """

    schedule: str = "constant"
    r: int = 8
    per_layer: tuple[int, ...] = ()
    ratio: float = 0.35
    scorer: str = "tome"
    proportional_attention: bool = True
    protect: int | None = None
    place: Literal["stream", "local"] = "stream"
    least_tokens: int = 64


Schedule = Callable[[MergeOptions, int], list[int | float]]
"""From the options and the number of blocks: tokens each block loses; a float is a share."""

SCHEDULES: dict[str, Schedule] = {}


def register_schedule(name: str) -> Callable[[Schedule], Schedule]:
    """Add a schedule under a name that ``MergeOptions.schedule`` can give."""

    def add(schedule: Schedule) -> Schedule:
        SCHEDULES[name] = schedule
        return schedule

    return add


@register_schedule("constant")
def _constant(options: MergeOptions, depth: int) -> list[int | float]:
    return [options.r] * depth


@register_schedule("list")
def _list(options: MergeOptions, depth: int) -> list[int | float]:
    if len(options.per_layer) != depth:
        message = f"per_layer has {len(options.per_layer)} numbers, the model has {depth} blocks"
        raise UsageError(message)
    return list(options.per_layer)


@register_schedule("decreasing")
def _decreasing(options: MergeOptions, depth: int) -> list[int | float]:
    """ToMe's ``(r, -1)``: from 2r in the first block to 0 in the last (Bolya et al., 2023)."""
    last = max(depth - 1, 1)
    return [int(2 * options.r - 2 * options.r * index / last) for index in range(depth)]


@register_schedule("fast")
def _fast(options: MergeOptions, depth: int) -> list[int | float]:
    """Few large steps, after 1/4, 1/2 and 3/4 of the depth: 3, 6 and 9 of 12 (MCTF-Fast)."""
    places = {max(round(depth * part / 4), 1) - 1 for part in (1, 2, 3)}
    return [options.ratio if index in places else 0 for index in range(depth)]


def reductions(options: MergeOptions, depth: int) -> list[int | float]:
    """What the schedule asks of each block, before the limits of each.

    Raises:
        UsageError: an unknown schedule, a number below 0, or a list of the wrong length.
    """
    schedule = SCHEDULES.get(options.schedule)
    if schedule is None:
        known = ", ".join(sorted(SCHEDULES))
        raise UsageError(f"no token schedule {options.schedule!r}; there are {known}")
    if options.r < 0 or any(r < 0 for r in options.per_layer):
        raise UsageError("tokens to merge in a block can't be fewer than 0")
    if not 0 <= options.ratio <= 0.5:
        message = f"the share of tokens to merge must be 0 to 0.5, got {options.ratio}"
        raise UsageError(f"{message}: at most half can, each into one of the others")
    return schedule(options, depth)
