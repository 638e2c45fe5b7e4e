"""Where the channels that enter and leave a module lie in its tensors.

A port's slices number the module's own channels as units; the dependency graph joins the ports
of all modules that share channels to one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deploykit.prune.structured_groups import Group, Slice, slice_of
from deploykit.prune.structured_slim import SlimAttention, SlimSingleHead

__all__ = ["Ports", "attention_groups", "is_leaf", "ports_of"]


@dataclass(frozen=True)
class Ports:
    """Slices of a module's input channels and of its output channels, and how many there are.

    ``joined``: input and output channels are the same ones (norms, depthwise convolutions).
    """

    reads: tuple[Slice, ...]
    writes: tuple[Slice, ...]
    channels_in: int
    channels_out: int
    joined: bool = False


def ports_of(module: nn.Module) -> Ports | None:
    """The ports of a module, or None where its channels can't be taken away."""
    for matches, maker in _PORTS:
        if matches(module):
            return maker(module)
    return None


def is_patch_merging(module: nn.Module) -> bool:
    """Swin's: four neighbours' channels side by side, normalised, then a linear layer."""
    norm, linear, dim = (getattr(module, name, None) for name in ("norm", "reduction", "dim"))
    return (
        isinstance(norm, nn.LayerNorm)
        and isinstance(linear, nn.Linear)
        and isinstance(dim, int)
        and norm.normalized_shape == (4 * dim,)
        and linear.in_features == 4 * dim
    )


def is_linear_attention(module: nn.Module) -> bool:
    """MobileViTv2's, whose sums over tokens keep a tracer busy for minutes."""
    parts = (getattr(module, name, None) for name in ("qkv_proj", "out_proj"))
    return all(isinstance(part, nn.Conv2d) for part in parts)


def is_leaf(module: nn.Module) -> bool:
    """Whether the dependency graph must not look into a module."""
    slim = isinstance(module, SlimAttention | SlimSingleHead)
    return slim or is_patch_merging(module) or is_linear_attention(module)


def _slices(
    owner: nn.Module, axis: int, position: Tensor, *names: str, produces: bool, scored: bool = True
) -> Iterator[Slice]:
    for name in names:
        part = slice_of(owner, name, axis, position, produces=produces, scored=scored)
        if part is not None:
            yield part


def _rows(module: nn.Module, position: Tensor) -> Iterator[Slice]:
    """Output channels of a layer, or of a convolution and the norm behind it."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            yield from _slices(part, 0, position, "weight", "bias", produces=True)
        elif isinstance(part, nn.modules.batchnorm._BatchNorm):
            yield from _norm(part, position)


def _norm(module: nn.Module, position: Tensor) -> Iterator[Slice]:
    yield from _slices(module, 0, position, "weight", "bias", produces=False)
    yield from _slices(
        module, 0, position, "running_mean", "running_var", produces=False, scored=False
    )


def _layer_in(module: nn.Module) -> nn.Linear | nn.Conv2d:
    """The linear layer or convolution of a module that is one, or wraps one."""
    return next(m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d))


def _columns(module: nn.Module, position: Tensor) -> Iterator[Slice]:
    yield from _slices(_layer_in(module), 1, position, "weight", produces=False)


def _linear(module: nn.Module) -> Ports:
    assert isinstance(module, nn.Linear)
    rows, columns = torch.arange(module.out_features), torch.arange(module.in_features)
    return Ports(
        tuple(_columns(module, columns)), tuple(_rows(module, rows)),
        module.in_features, module.out_features,
    )  # fmt: skip


def _conv(module: nn.Module) -> Ports:
    assert isinstance(module, nn.Conv2d)
    rows = tuple(_rows(module, torch.arange(module.out_channels)))
    if module.groups > 1:  # depthwise: the same channels in and out
        return Ports(rows, rows, module.in_channels, module.out_channels, joined=True)
    columns = tuple(_columns(module, torch.arange(module.in_channels)))
    return Ports(columns, rows, module.in_channels, module.out_channels)


def _norms(module: nn.Module) -> Ports | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    if isinstance(module, nn.GroupNorm) and module.num_groups != 1:
        return None
    channels = weight.numel()
    slices = tuple(_norm(module, torch.arange(channels)))
    return Ports(slices, slices, channels, channels, joined=True)


def _attention(module: nn.Module) -> Ports:
    assert isinstance(module, SlimAttention)
    names = ("qkv",) if "qkv" in module.names else ("q", "k", "v_proj")
    channels_in = _layer_in(module.get_submodule(names[0])).weight.shape[1]
    channels = torch.arange(channels_in)
    reads: list[Slice] = []
    for name in names:
        reads += _columns(module.get_submodule(name), channels)
    for name in ("norm", "reduce"):
        for part in module.get_submodule(name).modules() if name in module.names else ():
            reads += _norm(part, channels)
    out = _layer_in(module.proj).weight.shape[0]
    return Ports(tuple(reads), tuple(_rows(module.proj, torch.arange(out))), channels_in, out)


def _single_head(module: nn.Module) -> Ports:
    assert isinstance(module, SlimSingleHead)
    proj, attended = _layer_in(module.proj), module.attended
    assert isinstance(proj, nn.Conv2d)
    channels = attended + proj.in_channels - module.v
    first = torch.arange(attended)
    reads = [*_norm(module.pre_norm, first), *_columns(module.qkv, first)]
    others = torch.arange(attended, channels)
    reads.append(Slice(proj, "weight", 1, others, others - attended + module.v))
    rows = tuple(_rows(module.proj, torch.arange(proj.out_channels)))
    return Ports(tuple(reads), rows, channels, proj.out_channels)


def _merging(module: nn.Module) -> Ports:
    linear = module.reduction
    assert isinstance(linear, nn.Linear)
    channels = linear.in_features // 4
    four = torch.arange(channels)[:, None] + channels * torch.arange(4)
    assert isinstance(module.norm, nn.Module)
    reads = (*_norm(module.norm, four), *_columns(linear, four))
    rows = tuple(_rows(linear, torch.arange(linear.out_features)))
    return Ports(reads, rows, channels, linear.out_features)


def _linear_attention(module: nn.Module) -> Ports:
    qkv, out = module.qkv_proj, module.out_proj
    assert isinstance(qkv, nn.Conv2d)
    assert isinstance(out, nn.Conv2d)
    return Ports(
        tuple(_columns(qkv, torch.arange(qkv.in_channels))),
        tuple(_rows(out, torch.arange(out.out_channels))),
        qkv.in_channels,
        out.out_channels,
    )


def _is_plain_conv(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    depthwise = module.groups == module.in_channels == module.out_channels
    return module.groups == 1 or depthwise


_NORM_TYPES = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_PORTS: list[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Ports | None]]] = [
    (lambda m: isinstance(m, SlimAttention), _attention),
    (lambda m: isinstance(m, SlimSingleHead), _single_head),
    (is_patch_merging, _merging),
    (is_linear_attention, _linear_attention),
    (lambda m: isinstance(m, nn.Linear), _linear),
    (_is_plain_conv, _conv),
    (lambda m: isinstance(m, _NORM_TYPES), _norms),
]


def attention_groups(name: str, module: nn.Module) -> list[Group]:
    """Heads, query/key channels and value channels of a slim attention module."""
    if isinstance(module, SlimAttention):
        return _multi_head_groups(name, module)
    if isinstance(module, SlimSingleHead):
        return _single_head_groups(name, module)
    return []


def _multi_head_groups(name: str, module: SlimAttention) -> list[Group]:
    heads, qk, v = module.heads, module.qk, module.v
    q_rows, v_rows = torch.arange(heads * qk).view(heads, qk), torch.arange(heads * v)
    v_rows = v_rows.view(heads, v)
    if "qkv" in module.names:
        rows = [(module.qkv, q_rows), (module.qkv, q_rows + heads * qk)]
        values = (module.qkv, v_rows + 2 * heads * qk)
    else:
        rows = [(module.q, q_rows), (module.k, q_rows)]
        values = (module.v_proj, v_rows)
    by_head: list[Slice] = []
    by_qk: list[Slice] = []
    for layer, table in rows:
        by_head += _rows(layer, table)
        by_qk += _rows(layer, table.t()[:, :, None])
    by_head += _rows(*values)
    by_head += _columns(module.proj, v_rows)
    by_head += _slices(module, 0, torch.arange(heads), "table", produces=False, scored=False)
    by_v = [*_rows(values[0], values[1].t()[:, :, None])]
    by_v += _columns(module.proj, v_rows.t()[:, :, None])
    groups = [
        Group(
            name, "heads", heads, tuple(by_head), step=1,
            settle=(module, "heads"),
        ),
        Group(
            name, "v", v, tuple(by_v), copies=heads, free=True,
            settle=(module, "v"),
        ),
    ]  # fmt: skip
    if not {"q_norm", "k_norm"} & module.names:  # a norm over them ties them together
        groups.append(
            Group(
                name, "qk", qk, tuple(by_qk), copies=heads, free=True,
                settle=(module, "qk"),
            )
        )  # fmt: skip
    return groups


def _single_head_groups(name: str, module: SlimSingleHead) -> list[Group]:
    qk, v = module.qk, module.v
    both = torch.arange(qk)[:, None] + qk * torch.arange(2)
    values = torch.arange(v)
    by_v = (*_rows(module.qkv, values + 2 * qk), *_columns(module.proj, values))
    return [
        Group(
            name, "qk", qk, tuple(_rows(module.qkv, both)),
            settle=(module, "qk"),
        ),
        Group(name, "v", v, by_v, settle=(module, "v")),
    ]  # fmt: skip
