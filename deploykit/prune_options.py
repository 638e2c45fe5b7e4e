"""A recipe's merge, sparsify and recover sections in the prune room's terms."""

from __future__ import annotations

from dataclasses import replace

from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.sparsity import SparsityOptions
from deploykit.recipe_prune import MergeSection, SparsifySection

__all__ = ["merge_options", "sparsity_options"]


def merge_options(section: MergeSection) -> MergeOptions:
    """Of a section that names its tokens (not ``auto``)."""
    common = MergeOptions(scorer=section.scorer, place=section.place)
    if section.tokens == "fast":
        return replace(common, schedule="fast", ratio=section.share)
    numbers = tuple(int(part) for part in section.tokens.split(","))
    if len(numbers) == 1:
        return replace(common, schedule=section.schedule, r=numbers[0])
    return replace(common, schedule="list", per_layer=numbers)


def sparsity_options(section: SparsifySection) -> SparsityOptions:
    """The section's own terms, with the method that suits the pattern where none is named."""
    blocks = section.pattern.startswith("block")
    return SparsityOptions(
        pattern=section.pattern,
        method=section.method or ("distortion" if blocks else "sparsegpt"),
        sparsity=section.sparsity,
        allocation=section.allocation,
        exclude=tuple(section.exclude),
        images=section.images,
    )
