"""Whole residual blocks taken out: those without which the answers change least."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deploykit.errors import UsageError

__all__ = ["remove_blocks", "residual_blocks"]


def residual_blocks(module: nn.Module, example: Tensor) -> list[str]:
    """Names of the blocks that can be skipped: list items whose output is shaped as their input.

    Only the innermost such items that hold two layers or more: stages that happen to keep their
    shape are no blocks.

    Args:
        example: float32 (1, 3, S, S).
    """
    same: set[nn.Module] = set()
    hooks = []

    def note(part: nn.Module, args: tuple[object, ...], output: object) -> None:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        if args[0].shape == output.shape:
            same.add(part)

    listed = {
        f"{path}.{name}".strip("."): child
        for path, parent in module.named_modules()
        if isinstance(parent, nn.Sequential | nn.ModuleList)
        for name, child in parent.named_children()
        if not isinstance(child, nn.Sequential | nn.ModuleList)
    }
    for child in listed.values():
        hooks.append(child.register_forward_hook(note))
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    blocks = {
        name: child
        for name, child in listed.items()
        if child in same
        and sum(isinstance(part, nn.Linear | nn.Conv2d) for part in child.modules()) > 1
    }
    return [
        name
        for name in blocks
        if not any(other != name and other.startswith(f"{name}.") for other in blocks)
    ]


def remove_blocks(
    module: nn.Module,
    count: int,
    batches: Callable[[], Iterable[Tensor]],
    images: int,
    example: Tensor,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, float]:
    """Replace ``count`` blocks by identities in place, one after the other.

    Each time the block goes without which ``KL(answers of the whole network | answers)`` is
    least, in nats, averaged over the images.

    Returns:
        The blocks that went, in order, with that divergence once they were gone.

    Raises:
        UsageError: there are too few blocks.
    """
    names = residual_blocks(module, example)
    if len(names) <= count:
        message = f"wanted {count} blocks to go, got a network of {len(names)} residual blocks"
        raise UsageError(message)
    data = _first(batches(), images)
    with torch.no_grad():
        reference = [module(batch).log_softmax(-1) for batch in data]
    gone: dict[str, float] = {}
    for _ in range(count):
        changes = {}
        for name in names:
            block = _replace(module, name, nn.Identity())
            changes[name] = _divergence(module, data, reference)
            _replace(module, name, block)
            advance(1)
        least = min(changes, key=lambda name: (changes[name], names.index(name)))
        _replace(module, least, nn.Identity())
        names.remove(least)
        gone[least] = changes[least]
    return gone


def _replace(module: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """Put a module in another's place; returns the other."""
    owner, _, leaf = name.rpartition(".")
    parent = module.get_submodule(owner)
    before = parent.get_submodule(leaf)
    parent.add_module(leaf, part)
    return before


def _first(batches: Iterable[Tensor], images: int) -> list[Tensor]:
    found: list[Tensor] = []
    for batch in batches:
        left = images - sum(map(len, found))
        if left <= 0:
            break
        found.append(batch[:left])
    return found


@torch.no_grad()
def _divergence(module: nn.Module, data: list[Tensor], reference: list[Tensor]) -> float:
    total = count = 0.0
    for batch, before in zip(data, reference, strict=True):
        after = module(batch).log_softmax(-1)
        total += float((before.exp() * (before - after)).sum())
        count += len(batch)
    return total / count
