"""Scales of an attention's heads and channels, moved into the weights around it.

Exact in float: what is divided out of the weights that make q, k or v is multiplied back into
the logits, the other operand, or the projection's input columns. A grid per head (as AdaLog,
APHQ-ViT and FIMA-Q learn them) or per channel of v then needs one scale for the whole tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from deploykit.graph.edit import add_tensor, constant, is_op, layer_name
from deploykit.quant.folds.attention import AttentionGroup, Operand, find_attention
from deploykit.quant.folds.layers import absorb_input, scale_output, weight_dtype, weight_of
from deploykit.quant.folds.trace import readers

__all__ = [
    "balance_query_key",
    "find_attention",
    "fold_head_scales",
    "fold_query_key",
    "fold_value_channels",
    "scale_operand",
]

aten = torch.ops.aten


def fold_head_scales(
    graph_module: fx.GraphModule,
    group: AttentionGroup,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
) -> tuple[float | None, float | None, float | None]:
    """Turn per-head scales of the operands into one scale for each operand.

    With ``rho = s / s~`` per head, ``s~`` the mean of ``s``: rows and biases of head h of Wq, Wk
    and Wv are divided by ``rho``; the logits are multiplied by ``rho_q rho_k``, one constant per
    head, and the projection's input columns by ``rho_v``. Codes of a symmetric grid, or of one
    with a zero point that all heads share, are the same before and after.

    Args:
        q, k, v: (H,), positive: the scale of every head of ``group.query.node``,
            ``group.key.node`` and ``group.value.node``; None leaves that operand alone.

    Returns:
        The common scale ``s~`` of each operand, None where it was left alone.

    Raises:
        ValueError: an operand with a scale is declined, or its heads can't take different
            scales because they share channels (as under a q/k-norm); nothing is changed then.
    """
    everything = ((group.query, q), (group.key, k), (group.value, v))
    asked = [(part, scales) for part, scales in everything if scales is not None]
    factors = {}
    common = {}
    for part, scales in asked:
        mean = float(scales.double().mean().float())
        rho = scales.double() / mean
        if rho.shape != (group.heads,):
            raise ValueError(f"{group.heads} scales are wanted, not {tuple(rho.shape)}")
        factors[part.node] = rho
        common[part.node] = mean
        _per_channel(graph_module, part, _spread(part, rho))  # raises before anything changes
    product, last = torch.ones(group.heads, dtype=torch.float64), None
    for part, _ in asked:
        rho = factors[part.node]
        _divide(graph_module, part, _spread(part, rho), None, "head_scaled")
        if part is group.value:
            _scale_projection(graph_module, group, _spread(part, rho), None)
        else:
            product, last = product * rho, part
    if last is not None:
        _multiply_logits(graph_module, group, last, product)
    graph_module.recompile()
    return tuple(common.get(part.node) for part in (group.query, group.key, group.value))  # type: ignore[return-value]


def fold_value_channels(
    graph_module: fx.GraphModule, group: AttentionGroup, scale: Tensor, shift: Tensor | None = None
) -> None:
    """Let the value be ``(v + shift) / scale`` per channel; the projection takes it back.

    A shift comes out of the attention unchanged because the weights of every query sum to 1; the
    projection's bias takes it off.

    Args:
        scale: (H, D), positive, for head and dimension of ``group.value``.
        shift: (H, D) or None.

    Raises:
        ValueError: the value is declined, or a shift is given and ``shift_declined`` says why it
            can't be; nothing is changed then.
    """
    if shift is not None and group.value.declined is None and group.value.shift_declined:
        raise ValueError(group.value.shift_declined)
    scale = scale.double()
    shift = None if shift is None else shift.double()
    _per_channel(graph_module, group.value, scale)
    if shift is not None:
        _per_channel(graph_module, group.value, shift, positive=False)
    _divide(graph_module, group.value, scale, shift, "value_scaled")
    _scale_projection(graph_module, group, scale, shift)
    graph_module.recompile()


def fold_query_key(
    graph_module: fx.GraphModule, group: AttentionGroup, factor: Tensor, shift: Tensor | None = None
) -> None:
    """Let the query be ``q factor`` and the key ``(k + shift) / factor`` per channel.

    The attention stays: a shift of all keys adds the same number to all logits of a query, which
    the softmax doesn't see (as SageAttention, arXiv 2410.02367, smooths its keys).

    Args:
        factor: (H, D), positive. Under a q/k-norm with one weight for all heads, its rows must be
            equal.
        shift: (H, D) or None.

    Raises:
        ValueError: query or key is declined, or must take equal factors and doesn't, or a shift
            is given and ``shift_declined`` says why it can't be; nothing is changed then.
    """
    factor = factor.double()
    for part in (group.query, group.key):
        _per_channel(graph_module, part, factor)
    if shift is not None:
        if group.key.shift_declined is not None:
            raise ValueError(group.key.shift_declined)
        shift = shift.double()
        _per_channel(graph_module, group.key, shift, positive=False)
    _divide(graph_module, group.query, 1 / factor, None, "equalized")
    _divide(graph_module, group.key, factor, shift, "equalized")
    graph_module.recompile()


def scale_operand(graph_module: fx.GraphModule, operand: Operand, ratio: Tensor) -> None:
    """Divide an operand by ``ratio`` (H, D), positive, in the weights that make it.

    What is around has to make up for it.

    Raises:
        ValueError: the operand is declined, or must take equal factors and doesn't.
    """
    _divide(graph_module, operand, ratio, None, "scaled")


def balance_query_key(query_absmax: Tensor, key_absmax: Tensor) -> Tensor:
    """``sqrt(max|k| / max|q|)`` per channel, which gives both the same range; 1 at zeros."""
    query, key = query_absmax.double(), key_absmax.double()
    usable = (query > 0) & (key > 0)
    return torch.where(usable, (key / query.where(usable, 1.0)).sqrt(), 1.0)


def _spread(operand: Operand, per_head: Tensor) -> Tensor:
    """(H,) as (H, D)."""
    return per_head[:, None].expand(-1, operand.channels.shape[1])


def _per_channel(
    graph_module: fx.GraphModule, operand: Operand, values: Tensor, positive: bool = True
) -> Tensor:
    """Values (H, D) as one per channel of the operand's producers.

    Raises:
        ValueError: the operand is declined, the shape is wrong, a value is no positive finite
            number, or channels that must take equal values don't.
    """
    if operand.declined is not None:
        raise ValueError(operand.declined)
    channels = operand.channels
    if values.shape != channels.shape:
        raise ValueError(f"{tuple(channels.shape)} values are wanted, not {tuple(values.shape)}")
    if not bool(torch.isfinite(values).all()) or (positive and not bool((values > 0).all())):
        raise ValueError("every scale must be positive and finite, every shift finite")
    last = max(first + len(weight_of(graph_module, node)) for node, first in operand.producers)
    result = torch.full((last,), 1.0 if positive else 0.0, dtype=torch.float64)
    result[channels.flatten()] = values.flatten()
    if not torch.equal(result[channels], values):
        raise ValueError("its heads share channels, which can't take different factors")
    one, other = operand.mixed.unbind(1)
    if not torch.equal(result[one], result[other]):
        raise ValueError("channels that are added together can't take different factors")
    return result


def _divide(
    graph_module: fx.GraphModule, operand: Operand, ratio: Tensor, shift: Tensor | None, name: str
) -> None:
    """Let the operand be ``(x + shift) / ratio``, both (H, D), through its producers."""
    ratios = _per_channel(graph_module, operand, ratio)
    shifts = None if shift is None else _per_channel(graph_module, operand, shift, positive=False)
    for node, first in operand.producers:
        part = slice(first, first + len(weight_of(graph_module, node)))
        scale_output(graph_module, node, ratios[part], None if shifts is None else shifts[part],
                     name)  # fmt: skip


def _scale_projection(
    graph_module: fx.GraphModule, group: AttentionGroup, ratio: Tensor, shift: Tensor | None
) -> None:
    assert group.projection is not None
    ours, columns = group.columns >= 0, group.columns
    absorb_input(
        graph_module,
        group.projection,
        torch.where(ours, ratio.flatten()[columns], 1.0),
        None if shift is None else torch.where(ours, shift.flatten()[columns], 0.0),
        "head_scaled",
    )


def _multiply_logits(
    graph_module: fx.GraphModule, group: AttentionGroup, asked: Operand, factor: Tensor
) -> None:
    """Multiply the logits by one constant per head, in the multiplication after them if any."""
    if torch.equal(factor, torch.ones_like(factor)):
        return
    if group.head_axis is not None:
        factor = factor.reshape(-1, *[1] * (-group.head_axis - 1))
    users = readers(group.logits)
    scaling = users[0] if len(users) == 1 and is_op(users[0], aten.mul.Tensor) else None
    if scaling is not None:
        old = scaling.args[1] if scaling.args[0] is group.logits else scaling.args[0]
        tensor = constant(graph_module, old)
        if tensor is None and not isinstance(old, int | float):
            scaling = None  # a product with another activation
        elif tensor is not None:
            factor = factor * tensor.double()
        else:
            factor = factor * float(old)  # type: ignore[arg-type]
    value = factor.to(weight_dtype(graph_module, asked.producers[0][0]))
    before = scaling if scaling is not None else group.logits
    node = add_tensor(graph_module, f"{layer_name(group.logits)}.logits_scale", value, before)
    if scaling is not None:
        scaling.args = (group.logits, node)
        return
    with graph_module.graph.inserting_after(group.logits):
        scaled = graph_module.graph.call_function(aten.mul.Tensor, (group.logits, node))
    scaled.meta = {"nn_module_stack": group.logits.meta.get("nn_module_stack", {})}
    for user in users:
        user.replace_input_with(group.logits, scaled)
