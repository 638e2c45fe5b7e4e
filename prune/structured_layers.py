"""Every layer and attention product of a network, with its widths as functions of the groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deploykit.prune.structured_cost import Layer, Width, Widths
from deploykit.prune.structured_groups import Group
from deploykit.prune.structured_slim import SlimAttention, SlimSingleHead

__all__ = ["layers_of"]


def layers_of(module: nn.Module, groups: Sequence[Group], example: Tensor) -> list[Layer]:
    """Every layer and attention that ran, with its widths as functions of the groups.

    Args:
        example: float32 (1, 3, S, S).
    """
    widths = Widths(groups)
    found: list[Layer] = []
    names = {part: name for name, part in module.named_modules()}
    hooks = []

    def on(part: nn.Module, make: Callable[[str, nn.Module, Tensor, Tensor], Layer]) -> None:
        def note(part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(make(names[part], part, args[0], output))

        hooks.append(part.register_forward_hook(note))

    def linear(name: str, part: nn.Module, x: Tensor, output: Tensor) -> Layer:
        assert isinstance(part, nn.Linear)
        tokens = output.numel() // part.out_features
        sizes = widths.of(part, "weight", 1), widths.of(part, "weight", 0)
        return Layer(name, "linear", (tokens,), sizes, tokens)

    def conv(name: str, part: nn.Module, x: Tensor, output: Tensor) -> Layer:
        assert isinstance(part, nn.Conv2d)
        kernel = part.kernel_size[0] * part.kernel_size[1]
        area = output.shape[-1] * output.shape[-2]
        fixed = (x.shape[-1], output.shape[-1], part.kernel_size[0], part.stride[0])
        out = widths.of(part, "weight", 0)
        if part.groups > 1:
            macs = float(area * kernel * part.weight.shape[1])
            return Layer(name, "depthwise", fixed, (out,), macs)
        return Layer(
            name, "conv", fixed, (widths.of(part, "weight", 1), out), float(area * kernel)
        )

    def attention(name: str, part: nn.Module, x: Tensor, output: Tensor) -> Layer:
        if isinstance(part, SlimSingleHead):
            first = next(m for m in part.qkv.modules() if isinstance(m, nn.Conv2d))
            tokens = x.shape[-1] * x.shape[-2]
            keys, batch, start, qk = tokens, x.shape[0], 2 * part.qk, part.qk
            q, v = widths.of(first, "weight", 0, 0, qk), widths.of(first, "weight", 0, start)
            return Layer(name, "attention", (batch, tokens, keys), (q, v), batch * tokens * keys)
        assert isinstance(part, SlimAttention)
        batch, tokens = x.shape[0], x.shape[1]
        size = part.heads * part.qk
        if "qkv" in part.names:
            keys = tokens
            q = widths.of(part.qkv, "weight", 0, 0, size)
            v = widths.of(part.qkv, "weight", 0, 2 * size)
        else:
            keys = next(k for n, k in reduced if n is part.k)
            q, v = widths.of(part.q, "weight", 0), widths.of(part.v_proj, "weight", 0)
        # A head is there as long as its first query row is, whatever its width.
        heads = Width(tuple((n // part.qk, g) for n, g in _whole_heads(q, groups)))
        macs = float(batch * tokens * keys)
        return Layer(name, "attention", (batch, tokens, keys), (q, v), macs, heads)

    reduced: list[tuple[nn.Module, int]] = []
    for part in module.modules():
        if isinstance(part, nn.Linear):
            on(part, linear)
        elif isinstance(part, nn.Conv2d):
            on(part, conv)
        elif isinstance(part, SlimAttention | SlimSingleHead):
            if isinstance(part, SlimAttention) and "k" in part.names:
                key_layer = part.get_submodule("k")
                hooks.append(
                    key_layer.register_forward_hook(
                        lambda m, _, output: reduced.append((m, output.shape[1]))
                    )
                )
            on(part, attention)
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _whole_heads(
    width: Width, groups: Sequence[Group]
) -> list[tuple[int, tuple[int, ...]]]:
    return [
        (count, tuple(g for g in covering if groups[g].kind == "heads"))
        for count, covering in width.cells
    ]
