"""Every layer and attention product of a network, with its widths as functions of the groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deploykit.prune.structured_cost import Layer, Width, Widths
from deploykit.prune.structured_groups import Group
from deploykit.prune.structured_slim import SlimAttention, SlimSingleHead

__all__ = ["layers_of"]

_KINDS = (nn.Linear, nn.Conv2d, SlimAttention, SlimSingleHead)


def layers_of(module: nn.Module, groups: Sequence[Group], example: Tensor) -> list[Layer]:
    """Every layer and attention that runs, in order of completion.

    Args:
        example: float32 (1, 3, S, S).
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    hooks = []
    for name, part in module.named_modules():
        if isinstance(part, _KINDS):

            def note(
                part: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
            ) -> None:
                calls.append((name, part, args[0], output))

            hooks.append(part.register_forward_hook(note))
    try:
        with torch.no_grad():
            module(example)
    finally:
        for hook in hooks:
            hook.remove()
    widths = Widths(groups)
    tokens = {part: output.shape[1] for _, part, _, output in calls if output.ndim > 1}
    found = []
    for name, part, x, output in calls:
        if isinstance(part, nn.Linear):
            found.append(_linear(name, part, output, widths))
        elif isinstance(part, nn.Conv2d):
            found.append(_conv(name, part, x, output, widths))
        elif isinstance(part, SlimSingleHead):
            found.append(_single_head(name, part, x, widths))
        elif isinstance(part, SlimAttention):
            keys = x.shape[1] if "qkv" in part.names else tokens[part.k]
            found.append(_attention(name, part, x, keys, widths, groups))
    return found


def _linear(name: str, part: nn.Linear, output: Tensor, widths: Widths) -> Layer:
    tokens = output.numel() // part.out_features
    sizes = widths.of(part, "weight", 1), widths.of(part, "weight", 0)
    return Layer(name, "linear", (tokens,), sizes, tokens)


def _conv(name: str, part: nn.Conv2d, x: Tensor, output: Tensor, widths: Widths) -> Layer:
    area = output.shape[-1] * output.shape[-2]
    kernel = part.kernel_size[0] * part.kernel_size[1]
    fixed = (x.shape[-1], output.shape[-1], part.kernel_size[0], part.stride[0])
    out = widths.of(part, "weight", 0)
    if part.groups > 1:
        macs = float(area * kernel * part.weight.shape[1])
        return Layer(name, "depthwise", fixed, (out,), macs)
    sizes = widths.of(part, "weight", 1), out
    return Layer(name, "conv", fixed, sizes, float(area * kernel))


def _single_head(name: str, part: SlimSingleHead, x: Tensor, widths: Widths) -> Layer:
    layer = next(m for m in part.qkv.modules() if isinstance(m, nn.Conv2d))
    tokens = x.shape[-1] * x.shape[-2]
    sizes = (
        widths.of(layer, "weight", 0, 0, part.qk),
        widths.of(layer, "weight", 0, 2 * part.qk),
    )
    fixed = (x.shape[0], tokens, tokens)
    return Layer(name, "attention", fixed, sizes, float(x.shape[0] * tokens * tokens))


def _attention(
    name: str, part: SlimAttention, x: Tensor, keys: int, widths: Widths, groups: Sequence[Group]
) -> Layer:
    windows, tokens = x.shape[0], x.shape[1]
    rows = part.heads * part.qk
    if "qkv" in part.names:
        q = widths.of(part.qkv, "weight", 0, 0, rows)
        v = widths.of(part.qkv, "weight", 0, 2 * rows)
    else:
        q, v = widths.of(part.q, "weight", 0), widths.of(part.v_proj, "weight", 0)
    # A head is there as long as its query rows are, whatever their number.
    heads = Width(
        tuple(
            (count // part.qk, tuple(g for g in covering if groups[g].kind == "heads"))
            for count, covering in q.cells
        )
    )
    fixed = (windows, tokens, keys)
    return Layer(name, "attention", fixed, (q, v), float(windows * tokens * keys), heads)
