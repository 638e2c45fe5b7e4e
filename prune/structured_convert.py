"""A copy of a network whose attention modules are slim ones."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from deploykit.prune.structured_kinds import slim_attention

__all__ = ["slim_copy"]


def slim_copy(module: nn.Module, example: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """A copy with every attention module that is known replaced, and why others weren't.

    Args:
        example: float32 (1, 3, S, S). Attention is compared on what it makes of a random image
            of that shape: with zeros in, any two would agree.
    """
    copied = copy.deepcopy(module).eval()
    calls: dict[str, tuple[nn.Module, tuple[object, ...], dict[str, object], object]] = {}

    def noting(name: str):  # type: ignore[no-untyped-def]
        def note(
            part: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> None:
            calls[name] = (part, args, kwargs, output)

        return note

    hooks = [
        part.register_forward_hook(noting(name), with_kwargs=True)
        for name, part in copied.named_modules()
        if _may_attend(part)
    ]
    image = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            copied(image)
    finally:
        for hook in hooks:
            hook.remove()
    declined: dict[str, str] = {}
    for name, (part, args, kwargs, output) in calls.items():
        slim = slim_attention(part, args, kwargs, output)
        if slim is None:
            declined[name] = f"{type(part).__name__} is no attention whose layout is known"
            continue
        slim.requires_grad_(next(part.parameters()).requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(owner), leaf, slim)
    return copied, declined


def _may_attend(module: nn.Module) -> bool:
    """Whether a module itself makes queries, keys and values."""
    children = {name for name, _ in module.named_children()}
    return "proj" in children and bool(children & {"qkv", "q"})
