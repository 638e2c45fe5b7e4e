"""The largest share of tokens that few blocks may merge: ``fast`` with its share from data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from deploykit.graph.capture import CapturedModel
from deploykit.progress import Steps, silent
from deploykit.prune.merge_choose import Evaluate
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_tokens import merged_at_any_cost
from deploykit.types import PassRecord

__all__ = ["choose_share"]

SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)


def choose_share(
    captured: CapturedModel,
    evaluate: Evaluate,
    max_drop: float,
    options: MergeOptions,
    *,
    shares: Sequence[float] = SHARES,
    steps: Steps = silent,
) -> tuple[CapturedModel, PassRecord] | None:
    """Merge in three blocks only, as much as a limit allows.

    Matching tokens costs time in every block that merges, most beside int8 layers: few large
    merges can be faster than many small ones that save as many multiply-adds.

    Args:
        evaluate: the drop of a candidate in points.
        shares: of a block's tokens, rising; the drop is taken to rise with them.

    Returns:
        The model and the record, which lists the drops tried; None where no share holds.
    """
    best: tuple[CapturedModel, PassRecord] | None = None
    tried: dict[str, float] = {}
    low, high = 0, len(shares)
    with steps("choose what share merges in few blocks", total=len(shares).bit_length()) as advance:
        while low < high:
            middle = (low + high) // 2
            asked = replace(options, schedule="fast", ratio=shares[middle])
            merged, record = merged_at_any_cost(captured, asked)
            drop = evaluate(merged)
            tried[f"{100 * shares[middle]:.0f} %"] = drop
            advance(1)
            if drop <= max_drop:
                best, low = (merged, record), middle + 1
            else:
                high = middle
    if best is None:
        return None
    merged, record = best
    details = {**record.details, "max_drop": max_drop, "drops_tried": tried}
    return merged, record.model_copy(update={"details": details})
