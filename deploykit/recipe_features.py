"""What a recipe can't ask of a model that gives feature maps instead of scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deploykit.recipe import Recipe

__all__ = ["features_conflict"]


def features_conflict(recipe: Recipe) -> str | None:
    """Why ``model.features`` and another key don't go together, in one line; None if they do."""
    unlike = "model.features gives feature maps, which have no classes"
    for wanted, key, instead in (
        (recipe.gates.max_drop is not None, "gates.max_drop", "gates.min_sqnr_db"),
        (recipe.model.classes is not None, "model.classes", ""),
        (recipe.prune.blocks > 0, "prune.blocks", "prune.ratio"),
        (recipe.merge.tokens == "auto", "merge.tokens auto", "the number of tokens"),
        (recipe.evaluation.simulation, "evaluation.simulation", ""),
        (recipe.evaluation.research_integer_ops is not None, "evaluation.research_integer_ops", ""),
        (recipe.recover.active, "recover.data", ""),
    ):
        if wanted:
            mend = f"give {instead} instead" if instead else "leave it out"
            return f"{key} needs scores, but {unlike}; {mend}"
    return None
