"""Groups of channels that can only go together, and how they are taken away for good.

A *unit* of a group is what goes as a whole: one hidden channel, one head, one embedding channel.
A *slice* says which positions on one axis of one tensor belong to which unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "AxisKey", "Group", "Slice", "axis_keys", "remove_units", "slice_of"]

KINDS = ("mlp", "heads", "qk", "v", "conv", "embedding")
"""Hidden channels of an MLP; whole heads; query/key channels of every head; value channels of
every head; channels between convolutions; channels of the residual stream."""

AxisKey = tuple[nn.Module, str, int]


@dataclass(frozen=True)
class Slice:
    """Part of one axis of one tensor.

    Attributes:
        owner, tensor: ``getattr(owner, tensor)`` is the parameter or buffer.
        axis: which of its axes shrinks.
        unit, position: int64 (n,): position ``position[i]`` of the axis belongs to ``unit[i]``.
        copy: int64 (n,), where a group has several copies whose units are counted separately
            (the channels of every head); None is copy 0 throughout.
        produces: the tensor writes the channels; else it reads or scales them.
        scored: counts for the importance (position tables and statistics don't).
    """

    owner: nn.Module
    tensor: str
    axis: int
    unit: Tensor
    position: Tensor
    copy: Tensor | None = None
    produces: bool = False
    scored: bool = True

    @property
    def key(self) -> AxisKey:
        return self.owner, self.tensor, self.axis

    @property
    def copy_numbers(self) -> Tensor:
        return torch.zeros_like(self.unit) if self.copy is None else self.copy

    @property
    def value(self) -> Tensor:
        found = getattr(self.owner, self.tensor)
        assert isinstance(found, Tensor)
        return found


@dataclass(frozen=True)
class Group:
    """Units that can go one by one, each from all of the group's slices at once.

    Attributes:
        name: dotted name of the layer it is named after.
        kind: one of ``KINDS``.
        units: how many there are.
        slices: where they lie.
        copies: how many copies of the units there are; each unit goes from every copy.
        free: a copy's units may be matched with another copy's in any order.
        step: units go in steps of this many; 0 asks for the width that kernels like.
        settle: a module and its attribute that says how many units there are.
    """

    name: str
    kind: str
    units: int
    slices: tuple[Slice, ...]
    copies: int = 1
    free: bool = False
    step: int = 0
    settle: tuple[nn.Module, str] | None = None

    @property
    def key(self) -> str:
        """Tells it from all other groups of the network."""
        return f"{self.name}:{self.kind}"

    def reordered(self, order: Tensor) -> Group:
        """The same group with the units of each copy numbered anew.

        Args:
            order: int64 (copies, units): ``order[c, i]`` is the old number of the new unit i.
        """
        rank = torch.empty_like(order)
        rank.scatter_(1, order, torch.arange(self.units).expand_as(order).contiguous())
        slices = [replace(s, unit=rank[s.copy_numbers, s.unit]) for s in self.slices]
        return replace(self, slices=tuple(slices))


def slice_of(
    owner: nn.Module,
    tensor: str,
    axis: int,
    position: Tensor,
    *,
    produces: bool = False,
    scored: bool = True,
) -> Slice | None:
    """A slice from a table of positions; None where the owner has no such tensor.

    Args:
        position: int64 (units,), (units, k), or (units, copies, k).
    """
    if not isinstance(getattr(owner, tensor, None), Tensor):
        return None
    table = position if position.ndim == 3 else position.reshape(len(position), 1, -1)
    units, copies, _ = table.shape
    unit = torch.arange(units)[:, None, None].expand_as(table).reshape(-1)
    copy = torch.arange(copies)[None, :, None].expand_as(table).reshape(-1)
    return Slice(
        owner, tensor, axis, unit, table.reshape(-1), None if copies == 1 else copy,
        produces=produces, scored=scored,
    )  # fmt: skip


def axis_keys(groups: Sequence[Group]) -> Iterator[tuple[AxisKey, int, Slice]]:
    """Every slice with its axis and the index of its group."""
    for index, group in enumerate(groups):
        for part in group.slices:
            yield part.key, index, part


def remove_units(groups: Sequence[Group], kept: Mapping[str, Tensor]) -> None:
    """Take the units away from the modules the groups refer to, in place.

    An axis that several groups share loses what any of them gives up.

    Args:
        kept: by the group's key, bool (units,), True stays. A group that isn't named stays
            whole.
    """
    masks: dict[AxisKey, Tensor] = {}
    for key, index, part in axis_keys(groups):
        mask = kept.get(groups[index].key)
        if mask is None or bool(mask.all()):
            continue
        axis = masks.setdefault(key, torch.ones(part.value.shape[part.axis], dtype=torch.bool))
        axis[part.position[~mask[part.unit]]] = False
    for (owner, tensor, dimension), axis in masks.items():
        value = getattr(owner, tensor)
        device_index = axis.nonzero().flatten().to(value.device)
        smaller = value.detach().index_select(dimension, device_index).contiguous()
        if isinstance(value, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=value.requires_grad)
        setattr(owner, tensor, smaller)
    for owner in {owner for owner, _, _ in masks}:
        _refresh(owner)
    for group in groups:
        mask = kept.get(group.key)
        if mask is not None and group.settle is not None:
            setattr(*group.settle, int(mask.sum()))


def _refresh(module: nn.Module) -> None:
    """Set what a layer says of its sizes to what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        per_group_out = module.out_channels // module.groups
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels // per_group_out if module.groups > 1 else 1
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        assert module.running_mean is not None
        module.num_features = module.running_mean.numel()
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = module.weight.numel()
