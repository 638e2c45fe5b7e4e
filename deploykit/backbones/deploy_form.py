"""Branches that exist for training merged into the one layer they are equal to.

Blocks offer it themselves, by timm's protocol: ``reparameterize()`` or ``switch_to_deploy()``,
in place. timm's ``fuse()`` mostly folds a BatchNorm into the layer before it, which the graph does
for every network later, so it is called only where it merges branches. A block plus its own input
stays two operators: in one kernel the input's weight of 1 would leave the others few of 8 bits.

Ding et al., *RepVGG* (CVPR 2021), section 3.3; Vasu et al., *MobileOne* (CVPR 2023), section 3.2.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deploykit.errors import one_line
from deploykit.graph.levels import join_levels
from deploykit.synthetic import synthetic_images
from deploykit.types import Backbone

__all__ = ["in_deploy_form"]

_METHODS = ("reparameterize", "switch_to_deploy")
_FUSED_BRANCHES = ("RepVggDw", "RepVitClassifier")  # classes of timm's RepViT
_TOLERANCE = 1e-4  # of the largest score


def in_deploy_form(backbone: Backbone) -> tuple[nn.Module, str | None]:
    """The backbone's module with its training branches merged, and a note; itself without any.

    Both forms are compared on synthetic images. A form whose scores differ by more than 1e-4 of
    the largest, or that can't be made, isn't taken, and the note says so. The module isn't changed.
    """
    module = backbone.module
    if not any(_merger(child) for child in module.modules()):
        return module, None
    images = synthetic_images(2, backbone.preprocessing, 0)
    module.train()  # leaving eval mode drops bias caches, which can't be copied
    module.eval()
    with torch.no_grad():
        try:
            merged = copy.deepcopy(module)
            count = _merge(merged)
            before, after = _joined(module(images)), _joined(merged.eval()(images))
        except Exception as error:  # blocks of any package, with failures of any type
            what = one_line(error, 120)
            return module, f"branches for training are kept: merging them failed ({what})"
        difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-12))
    if not difference <= _TOLERANCE:  # a NaN isn't
        note = f"branches for training are kept: merged, scores differ by {difference:.1g}"
        return module, note
    blocks = "block" if count == 1 else "blocks"
    return merged, f"{count} {blocks} in deployment form (scores differ by {difference:.0e})"


def _joined(output: Tensor | Sequence[Tensor]) -> Tensor:
    """Scores as they are; feature maps joined."""
    return output if isinstance(output, Tensor) else join_levels(list(output))


def _merger(module: nn.Module) -> Callable[[], object] | None:
    """The method that merges a block's branches, None where it has none that needs no arguments."""
    names = (*_METHODS, "fuse") if type(module).__name__ in _FUSED_BRANCHES else _METHODS
    for name in names:
        method = getattr(module, name, None)
        if callable(method) and not _needs_arguments(method):
            found: Callable[[], object] = method
            return found
    return None


def _needs_arguments(method: Callable[..., object]) -> bool:
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):
        return True
    return False


def _merge(module: nn.Module) -> int:
    """Merge in place, below ``module`` and in it; how many blocks."""
    count = 0
    for name, child in module.named_children():
        merge = _merger(child)
        if merge is not None:
            made = merge()  # the block again or nothing, or the layer that replaces it
            if isinstance(made, nn.Module) and made is not child:
                setattr(module, name, made)
            count += 1
        count += _merge(getattr(module, name))
    return count
