"""The query, key or value of an attention, traced back to the layers that make its channels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from deploykit.quant.folds.layers import channel_axis, is_affine_norm, is_layer, op_name
from deploykit.quant.folds.trace import BlockedError, Labels, Trace, keeps_shift, readers, table

__all__ = ["Found", "Operand", "OperandFinder", "make_operand"]


@dataclass(frozen=True)
class Operand:
    """The query, key or value of an attention.

    Attributes:
        node: what the product reads; its values are what a scale refers to.
        declined: why its channels can't be scaled, or None.
        channels: int64 (H, D), the number, over all producers' output channels one after the
            other, of the channel that each head's dimension reads.
        producers: the layers (or, under a q/k-norm, the affine norm) that make it, with the
            number of each one's first channel.
        mixed: int64 (M, 2), pairs of channels that are added together before the product, as
            by a rotary embedding: they must take equal factors.
        shift_declined: why a constant can't be added to its channels, or None.
    """

    node: fx.Node
    declined: str | None = None
    channels: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    producers: tuple[tuple[fx.Node, int], ...] = ()
    mixed: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))
    shift_declined: str | None = None

    @property
    def shared(self) -> bool:
        """Whether the heads read the same channels, so they must take equal factors."""
        return bool(self.channels.numel() != self.channels.unique().numel())


@dataclass(frozen=True)
class Found:
    """One operand's labels, channels last: (…, tokens, D), and what was passed on the way."""

    labels: Labels
    producers: tuple[fx.Node, ...]
    between: tuple[fx.Node, ...]
    varying: tuple[int, ...]  # the leading axes that labels vary along, from the end
    ndim: int


class OperandFinder:
    """Traces operands back to their producers; channels are numbered over all of them."""

    def __init__(self, trace: Trace) -> None:
        self.graph = trace
        self.first: dict[fx.Node, int] = {}
        self.count = 0
        self.known: dict[fx.Node, Labels] = {}
        self.order = {node: at for at, node in enumerate(trace.graph_module.graph.nodes)}

    def trace(self, node: fx.Node, axis: int) -> Found | str:
        """Labels of an operand whose channels lie along ``axis``, or why they can't be had."""
        try:
            return self._trace(node, axis)
        except BlockedError as blocked:
            return str(blocked)

    def _trace(self, node: fx.Node, axis: int) -> Found:
        producers, between, todo = set(), set(), [node]
        while todo:
            current = todo.pop()
            if current in producers or current in between:
                continue
            graph_module = self.graph.graph_module
            if is_layer(graph_module, current) or is_affine_norm(graph_module, current):
                producers.add(current)
            elif current.op == "placeholder":
                raise BlockedError("no layer makes it")
            else:
                between.add(current)
                todo += self.graph.parts(current)
        for current in sorted(producers | between, key=self.order.__getitem__):
            if current in self.known:
                continue
            if current in producers:
                self.known[current] = [self._number(current)]
            else:
                self.known[current] = self.graph.step(current, self.known)
        labels = [entry.transpose(axis, -1) for entry in self.known[node]]
        if any(int(entry.min()) < 0 for entry in labels):
            raise BlockedError("part of it is a constant or another activation")
        first = labels[0]
        varying = tuple(
            at - first.ndim
            for at in range(first.ndim - 2)
            if not bool((first == first.narrow(at, 0, 1)).all())
        )
        return Found(labels, tuple(producers), tuple(between), varying, first.ndim)

    def _number(self, producer: fx.Node) -> Tensor:
        shape = self.graph.shape(producer)
        axis = channel_axis(producer)
        channels = torch.arange(shape[axis], dtype=torch.int32)
        if producer not in self.first:
            self.first[producer] = self.count
            self.count += shape[axis]
        channels = channels + self.first[producer]
        if axis == 1:
            channels = channels.reshape(-1, *[1] * (len(shape) - 2))
        return channels.expand(shape)


def make_operand(
    finder: OperandFinder,
    node: fx.Node,
    everything: dict[str, Found | str],
    name: str,
    head_axis: int | None,
    heads: int,
    sinks: set[tuple[fx.Node, fx.Node]],
) -> Operand:
    found = everything[name]
    if isinstance(found, str):
        return Operand(node, declined=found)
    try:
        channels = _channels(found.labels[0], head_axis, heads)
    except BlockedError as blocked:
        return Operand(node, declined=str(blocked))
    ours = torch.cat([entry.flatten().unique() for entry in found.labels]).unique()
    for other, part in everything.items():
        if other != name and isinstance(part, Found):
            theirs = torch.cat([entry.flatten().unique() for entry in part.labels])
            if bool(torch.isin(ours, theirs).any()):
                return Operand(node, declined=f"the {other} reads the same channels")
    reason = _read_elsewhere(finder, ours, sinks)
    if reason is not None:
        return Operand(node, declined=reason)
    pairs = [torch.stack([found.labels[0].flatten(), entry.flatten()], 1).unique(dim=0)
             for entry in found.labels[1:]]  # fmt: skip
    shift_reason = None
    if pairs or not all(keeps_shift(between) for between in found.between):
        shift_reason = "it is multiplied or added to on the way"
    return Operand(
        node=node,
        channels=channels,
        producers=tuple((producer, finder.first[producer]) for producer in found.producers),
        mixed=torch.cat(pairs).long() if pairs else torch.zeros(0, 2, dtype=torch.int64),
        shift_declined=shift_reason,
    )


def _channels(labels: Tensor, head_axis: int | None, heads: int) -> Tensor:
    """The labels as (H, D)."""
    if head_axis is None or -head_axis > labels.ndim:
        rows = table(labels, [-1])[None]
    else:
        rows = table(labels, [head_axis, -1])
    return rows.long().expand(heads, -1)


def _read_elsewhere(
    finder: OperandFinder, ours: Tensor, sinks: set[tuple[fx.Node, fx.Node]]
) -> str | None:
    """Whether any of the channels reaches something else than the attention's products."""
    todo = [
        (user, node, labels)
        for node, labels in finder.known.items()
        for user in readers(node)
        if user not in finder.known or user in finder.first  # a producer's input is read by it
    ]
    while todo:
        user, node, labels = todo.pop()
        if (user, node) in sinks or not _carries(labels, ours):
            continue
        try:
            after = finder.graph.step(user, {node: labels})
        except BlockedError:
            return f"{op_name(user)} reads its channels too"
        todo += [(reader, user, after) for reader in readers(user)]
    return None


def _carries(labels: Labels, channels: Tensor) -> bool:
    for entry in labels:
        for part in entry if isinstance(entry, tuple | list) else (entry,):
            if bool(torch.isin(channels, part).any()):
                return True
    return False
