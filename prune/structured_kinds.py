"""How the attention modules of known networks become slim ones. One function a kind.

A kind is recognised by what it has (duck typing), then tried: ``slim_attention`` keeps a
replacement only if it computes what the original does on the inputs the original really gets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deploykit.prune.structured_slim import SlimAttention, SlimSingleHead

__all__ = ["ATTENTION_KINDS", "Slim", "attention_kind", "slim_attention"]

Slim = SlimAttention | SlimSingleHead
_Maker = Callable[[nn.Module], Slim | None]

ATTENTION_KINDS: dict[str, _Maker] = {}
"""Name to maker: a slim module of the same tensors, or None where the kind is another."""

_TOLERANCE = 1e-4  # of the largest output


def attention_kind(name: str) -> Callable[[_Maker], _Maker]:
    """Register a kind."""

    def add(maker: _Maker) -> _Maker:
        ATTENTION_KINDS[name] = maker
        return maker

    return add


def slim_attention(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
) -> Slim | None:
    """The slim form of an attention module, or None where no kind computes the same.

    Args:
        args, kwargs, output: of one real call of ``module`` in eval mode.
    """
    for maker in ATTENTION_KINDS.values():
        made = maker(module)
        if made is None:
            continue
        made.eval()
        if isinstance(output, Tensor) and _agrees(made, args, kwargs, output):
            return made
    return None


def _agrees(
    made: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor
) -> bool:
    try:
        with torch.no_grad():
            result = made(*args, **kwargs)
    except Exception:  # a module that only looks like the kind fails in its own way
        return False
    if result.shape != output.shape:
        return False
    return bool((result - output).abs().max() <= _TOLERANCE * output.abs().max() + 1e-6)


def _parts(module: nn.Module, *names: str) -> dict[str, nn.Linear] | None:
    """The children of these names if all are there and are linear layers."""
    found = {}
    for name in names:
        part = getattr(module, name, None)
        if not isinstance(part, nn.Linear):
            return None
        found[name] = part
    return found


def _number(module: nn.Module, *names: str) -> int:
    """The first of these attributes that is a whole number; 0 where none is."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _norms(module: nn.Module) -> dict[str, nn.Module]:
    found = {name: getattr(module, name, None) for name in ("q_norm", "k_norm")}
    return {
        name: norm
        for name, norm in found.items()
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
    }


@attention_kind("fused")
def fused(module: nn.Module) -> Slim | None:
    """``qkv`` of (3, heads, dim) rows: DeiT, ViT, DINOv2, MobileViT, Swin's windows."""
    parts, heads = _parts(module, "qkv", "proj"), _number(module, "num_heads")
    if parts is None or heads == 0:
        return None
    rows = parts["qkv"].out_features
    if rows % (3 * heads):
        return None
    dim = rows // (3 * heads)
    table, index = getattr(module, "relative_position_bias_table", None), None
    if isinstance(table, Tensor):
        index = getattr(module, "relative_position_index", None)
        if not isinstance(index, Tensor):
            return None
        table = table.detach().t().contiguous()
    else:
        table = None
    return SlimAttention(
        {**parts, **_norms(module)}, heads=heads, qk=dim, v=dim, scale=float(dim) ** -0.5,
        table=table, index=index,
    )  # fmt: skip


@attention_kind("interleaved")
def interleaved(module: nn.Module) -> Slim | None:
    """``qkv`` of heads × (key, key, value) rows, a bias per offset: TinyViT, EfficientFormer."""
    parts, heads = _parts(module, "qkv", "proj"), _number(module, "num_heads")
    qk, v = _number(module, "key_dim"), _number(module, "val_dim")
    if parts is None or not heads or not qk or not v:
        return None
    linear = parts["qkv"]
    if linear.out_features != heads * (2 * qk + v):
        return None
    rows = torch.arange(linear.out_features).reshape(heads, 2 * qk + v)
    order = torch.cat([part.reshape(-1) for part in rows.split([qk, qk, v], dim=1)])
    sorted_rows = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    with torch.no_grad():
        sorted_rows.weight.copy_(linear.weight[order])
        if linear.bias is not None:
            sorted_rows.bias.copy_(linear.bias[order])
    norm = getattr(module, "norm", None)
    before = {"norm": norm} if isinstance(norm, nn.Module) else {}
    table, index = getattr(module, "attention_biases", None), None
    if isinstance(table, Tensor):
        table, index = table.detach(), getattr(module, "attention_bias_idxs", None)
    return SlimAttention(
        {**before, **parts, "qkv": sorted_rows}, heads=heads, qk=qk, v=v, scale=float(qk) ** -0.5,
        table=table, index=index,
    )  # fmt: skip


class _Reduce(nn.Module):
    """Fewer tokens for keys and values: pooled, then normalised (Next-ViT)."""

    def __init__(self, pool: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.pool, self.norm = pool, norm

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.pool(x.transpose(1, 2))).transpose(1, 2)
        return result


@attention_kind("separate")
def separate(module: nn.Module) -> Slim | None:
    """``q``, ``k`` and ``v`` apart, keys and values of pooled tokens: Next-ViT."""
    parts, heads = _parts(module, "q", "k", "v", "proj"), _number(module, "num_heads")
    if parts is None or heads == 0:
        return None
    parts["v_proj"] = parts.pop("v")
    qk, v = parts["q"].out_features // heads, parts["v_proj"].out_features // heads
    reduce: dict[str, nn.Module] = {}
    pool, norm = getattr(module, "sr", None), getattr(module, "norm", None)
    if isinstance(pool, nn.Module) and isinstance(norm, nn.Module):
        if any(True for _ in pool.parameters()):
            return None  # a convolution mixes channels: its own widths would have to be known
        reduce["reduce"] = _Reduce(pool, norm)
    return SlimAttention(
        {**parts, **reduce, **_norms(module)}, heads=heads, qk=qk, v=v, scale=float(qk) ** -0.5
    )


@attention_kind("single_head")
def single_head(module: nn.Module) -> Slim | None:
    """Part of the channels attends, with one head: SHViT."""
    children = [getattr(module, name, None) for name in ("pre_norm", "qkv", "proj")]
    qk, attended = _number(module, "qk_dim"), _number(module, "pdim")
    if not qk or not attended or not all(isinstance(child, nn.Module) for child in children):
        return None
    norm, qkv, proj = (child for child in children if child is not None)
    return SlimSingleHead(norm, qkv, proj, qk=qk, v=attended, scale=float(qk) ** -0.5)
