"""The recipe's wish for zeros in the prune room's terms."""

from __future__ import annotations

from deploykit.prune.sparsity import SparsityOptions
from deploykit.recipe import Recipe

__all__ = ["sparsity_options"]


def sparsity_options(recipe: Recipe) -> SparsityOptions | None:
    """None where no zeros are wanted.

    Real calibration images let SparseGPT and the biases make up for what is removed; synthetic
    ones would fit them to noise, so magnitude decides there.
    """
    if recipe.prune.sparsity == "none":
        return None
    if recipe.calibration.data is None:
        return SparsityOptions(recipe.prune.sparsity, "magnitude")
    return SparsityOptions(recipe.prune.sparsity, "sparsegpt", bias_correction=True)
