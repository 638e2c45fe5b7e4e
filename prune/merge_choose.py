"""How many tokens each block may merge, from data: most where it does least damage.

Each block's merge is first tried alone, and the change of the logits measured. A reduction of the
whole model is shared out by damage for multiply-adds saved, and the largest reduction that an
evaluation accepts is found by bisection.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.progress import Steps, silent
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_tokens import merge_tokens, mergeable, merged_at_any_cost
from deploykit.types import PassRecord

__all__ = ["LADDER", "Steps", "choose_merging", "disagreement", "share_out"]

LADDER = tuple(step / 20 for step in range(1, 13))
"""Shares of the multiply-adds to save that are tried: 5 to 60 %."""

_LEVELS = (0.25, 0.5, 1.0)
"""Shares of the most a block can merge at which its damage is measured."""

Batches = Callable[[], Iterable[Tensor]]
Evaluate = Callable[[CapturedModel], float]


@dataclass(frozen=True)
class BlockDamage:
    """What merging in one block alone does.

    Attributes:
        most: how many tokens it can merge.
        damage: (tokens merged, mean KL divergence of the classes) from 0 up.
        saved: multiply-adds a merged token saves.
    """

    most: int
    damage: tuple[tuple[int, float], ...]
    saved: float

    def slope(self, r: int) -> float:
        """Damage of one more token where ``r`` are merged already; never falls as r grows."""
        steepest = 0.0
        for (low, before), (high, after) in zip(self.damage, self.damage[1:], strict=False):
            steepest = max(steepest, (after - before) / (high - low))
            if r < high:
                break
        return steepest

    def total(self, r: int) -> float:
        """Damage of ``r`` merged tokens."""
        return sum(map(self.slope, range(r)))


def disagreement(captured: CapturedModel, batches: Batches) -> Evaluate:
    """An evaluation without labels: percent of images whose first class isn't the model's own."""
    own = _classes(captured, batches)

    def evaluate(candidate: CapturedModel) -> float:
        return 100 * float((_classes(candidate, batches) != own).float().mean())

    return evaluate


@torch.no_grad()
def _classes(captured: CapturedModel, batches: Batches) -> Tensor:
    return torch.cat([captured.graph_module(batch).argmax(1) for batch in batches()])


@torch.no_grad()
def _log_probabilities(captured: CapturedModel, batches: Batches) -> Tensor:
    """(images, classes): all that is kept of the images."""
    outputs = [captured.graph_module(batch).log_softmax(1) for batch in batches()]
    return torch.cat(outputs)


def choose_merging(
    captured: CapturedModel,
    batches: Batches,
    evaluate: Evaluate,
    max_drop: float,
    options: MergeOptions | None = None,
    *,
    ladder: Sequence[float] = LADDER,
    steps: Steps = silent,
) -> tuple[CapturedModel, PassRecord]:
    """The model with the most merged whose drop stays within a limit.

    Args:
        captured: left unchanged.
        batches: calibration batches, float32 (n, 3, S, S), the same from the start on each call.
            All are run ``1 + 3 blocks`` times: a few dozen images are enough.
        evaluate: the drop of a candidate in points, or ``disagreement``.
        max_drop: the largest drop allowed, in points.
        options: scorer and whatever isn't the schedule.
        ladder: shares of the multiply-adds to save, rising.

    Returns:
        The merged model and the record; an unmerged copy where no step of the ladder holds.

    Raises:
        UsageError: nothing can be merged at all; the reason.
    """
    options = MergeOptions() if options is None else options
    if options.place != "stream":
        raise UsageError("tokens are chosen from data where they merge for good, not locally")
    found = _measure(captured, batches, options, steps)
    depth = len(found)
    tried: dict[float, float] = {}
    best: tuple[float, CapturedModel, PassRecord] | None = None
    low, high = 0, len(ladder)
    total, protected, tokens = found.total, found.protected, found.tokens
    with steps("choose how many tokens merge", total=max(high, 1).bit_length()) as advance:
        while low < high:
            middle = (low + high) // 2
            amounts = share_out(found.blocks, ladder[middle] * total, tokens, protected)
            if amounts is None:
                high = middle
                continue
            per_layer = tuple(amounts.get(index, 0) for index in range(depth))
            asked = replace(options, schedule="list", per_layer=per_layer)
            merged, record = merged_at_any_cost(captured, asked)
            if record.details["macs_after"] >= record.details["macs_before"]:
                low = middle + 1  # matching eats what so few tokens save
                continue
            tried[ladder[middle]] = drop = evaluate(merged)
            advance(1)
            if drop <= max_drop:
                best, low = (drop, merged, record), middle + 1
            else:
                high = middle
    return _chosen(captured, options, best, tried, max_drop, found)


@dataclass(frozen=True)
class _Measured:
    """What was found of every mergeable block, by its place among them."""

    names: tuple[str, ...]
    blocks: Mapping[int, BlockDamage]
    total: int
    tokens: int
    protected: int

    def __len__(self) -> int:
        return len(self.names)


def _measure(
    captured: CapturedModel, batches: Batches, options: MergeOptions, steps: Steps
) -> _Measured:
    all_blocks, protected = mergeable(captured, options)
    blocks = [block for block in all_blocks if block.residual is not None]
    depth, tokens = len(blocks), max(block.tokens for block in blocks)
    _, record = merged_at_any_cost(captured, replace(options, schedule="constant", r=1))
    total = record.details["macs_before"]
    reference = _log_probabilities(captured, batches)
    found = {}
    with steps("measure what merging does in each block", total=depth * len(_LEVELS)) as advance:
        for index, block in enumerate(blocks):
            if block.name in record.details["declined"]:
                advance(len(_LEVELS))
                continue
            most = (block.tokens - protected) // 2
            damage, saved = [(0, 0.0)], 0.0
            for r in sorted({max(int(most * level), 1) for level in _LEVELS}):
                per_layer = tuple(r if other == index else 0 for other in range(depth))
                asked = replace(options, schedule="list", per_layer=per_layer)
                merged, alone = merged_at_any_cost(captured, asked)
                other_classes = _log_probabilities(merged, batches)
                kl = F.kl_div(other_classes, reference, log_target=True, reduction="batchmean")
                damage.append((r, max(float(kl), 0.0)))
                saved = (total - alone.details["macs_after"]) / r
                advance(1)
            found[index] = BlockDamage(most, tuple(damage), saved)
    return _Measured(tuple(block.name for block in blocks), found, total, tokens, protected)


def share_out(
    blocks: Mapping[int, BlockDamage], target: float, tokens: int, protected: int
) -> dict[int, int] | None:
    """Tokens each block merges so that ``target`` multiply-adds are saved with least damage.

    Greedy, a token at a time, by the damage for what is saved. At most half of the tokens that
    reach a block and may merge do: one more in an early block can take some from later ones.

    Args:
        blocks: by index, in order.
        tokens: N in front of the first block.

    Returns:
        Amounts by index; None where the target can't be reached.
    """
    amounts = dict.fromkeys(sorted(blocks), 0)
    saved = harm = 0.0
    while saved < target:
        moves = []
        # One more can take as many from a later block; two can't.
        for index, more in itertools.product(amounts, (1, 2)):
            after = _moved(amounts, blocks, index, more, tokens - protected)
            gain = sum(blocks[i].saved * r for i, r in after.items()) - saved
            if gain > 0:
                worse = sum(blocks[i].total(r) for i, r in after.items()) - harm
                moves.append((worse / gain, more, index, after))
        if not moves:
            return None
        amounts = min(moves, key=lambda move: move[:3])[3]
        saved = sum(blocks[i].saved * r for i, r in amounts.items())
        harm = sum(blocks[i].total(r) for i, r in amounts.items())
    return amounts


def _moved(
    amounts: Mapping[int, int], blocks: Mapping[int, BlockDamage], index: int, more: int, free: int
) -> dict[int, int]:
    """The amounts with ``more`` at ``index``, each within its limit."""
    after = {}
    for other, amount in amounts.items():
        after[other] = min(amount + more * (other == index), blocks[other].most, free // 2)
        free -= after[other]
    return after


def _chosen(
    captured: CapturedModel,
    options: MergeOptions,
    best: tuple[float, CapturedModel, PassRecord] | None,
    tried: dict[float, float],
    max_drop: float,
    found: _Measured,
) -> tuple[CapturedModel, PassRecord]:
    details = {
        "max_drop": max_drop,
        "drops_tried": {f"{100 * share:.0f} %": drop for share, drop in sorted(tried.items())},
        "damage": {
            found.names[index]: [list(point) for point in block.damage]
            for index, block in found.blocks.items()
        },
    }
    if best is None:
        text = f"no tokens merge: the smallest step tried costs more than {max_drop:g} points"
        nothing, record = merge_tokens(captured, replace(options, schedule="constant", r=0))
        return nothing, PassRecord(name=record.name, summary=text, details=record.details | details)
    drop, merged, record = best
    summary = f"{record.summary}; {drop:.2f} points of the {max_drop:g} allowed"
    details["drop"] = drop
    return merged, PassRecord(name=record.name, summary=summary, details=record.details | details)
