"""A recipe's prune, merge and sparsify sections in the prune room's terms."""

from __future__ import annotations

from dataclasses import replace

from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.sparsity import SparsityOptions
from deploykit.prune.structured_options import StructureOptions
from deploykit.recipe_prune import MergeSection, PruneSection, SparsifySection

__all__ = ["merge_options", "sparsity_options", "structure_options"]


def merge_options(section: MergeSection) -> MergeOptions:
    """The section's own terms; of ``auto``, what doesn't depend on the schedule."""
    common = MergeOptions(scorer=section.scorer, place=section.place)
    if section.tokens == "auto":
        return common
    if section.tokens == "fast":
        return replace(common, schedule="fast", ratio=section.share)
    numbers = tuple(int(part) for part in section.tokens.split(","))
    if len(numbers) == 1:
        return replace(common, schedule=section.schedule, r=numbers[0])
    return replace(common, schedule="list", per_layer=numbers)


def structure_options(section: PruneSection, seed: int) -> StructureOptions:
    """The section's own terms."""
    return StructureOptions(
        ratio=section.ratio,
        budget=section.budget,
        scope=tuple(section.scope),
        importance=section.importance,
        fairness=section.fairness,
        round_to=section.round_to,
        layer_limit=section.layer_limit,
        blocks=section.blocks,
        images=section.images,
        seed=seed,
    )


def sparsity_options(section: SparsifySection, *, real_images: bool) -> SparsityOptions:
    """The section's own terms.

    Args:
        real_images: there are calibration images: second-order methods learn nothing of value
            from synthetic ones.
    """
    method: str | None = section.method
    if method is None:
        learnt = "distortion" if section.pattern.startswith("block") else "sparsegpt"
        method = learnt if real_images else "magnitude"
    return SparsityOptions(
        pattern=section.pattern,
        method=method,
        sparsity=section.sparsity,
        allocation=section.allocation,
        exclude=tuple(section.exclude),
        images=section.images,
        bias_correction=method == "sparsegpt" and real_images,
    )
