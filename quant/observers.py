"""Histograms of activations: bounded in memory however many images are seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Histogram", "Watch", "collect_histograms", "sample_rows"]

TENSOR_BINS = 2048
CHANNEL_BINS = 512
SAMPLE_ROWS = 1024


@dataclass(frozen=True)
class Watch:
    """What to record of one node: all values together, or each channel by itself."""

    node: str
    channel_axis: int | None = None


@dataclass(frozen=True)
class Histogram:
    """Equal-width counts between exact extremes.

    Attributes:
        low, high: float32 (C,), the extremes; C is 1 for a whole tensor.
        counts: float32 (C, bins).
    """

    low: Tensor
    high: Tensor
    counts: Tensor

    @property
    def centres(self) -> Tensor:
        """The middle of every bin, (C, bins)."""
        bins = self.counts.shape[1]
        steps = (torch.arange(bins, dtype=torch.float32) + 0.5) / bins
        return self.low[:, None] + (self.high - self.low)[:, None] * steps


class _Extremes:
    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        rows = _rows(x, self.axis)
        low, high = torch.aminmax(rows, dim=1)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


class _Counts:
    def __init__(self, extremes: _Extremes) -> None:
        assert extremes.low is not None and extremes.high is not None
        self.axis = extremes.axis
        self.low, self.high = extremes.low, extremes.high
        self.bins = TENSOR_BINS if self.axis is None else CHANNEL_BINS
        self.counts = torch.zeros(len(self.low), self.bins)

    def update(self, x: Tensor) -> None:
        rows = _rows(x, self.axis)
        # A constant channel has no width; any positive one puts all of it in bin 0.
        width = torch.where(self.high > self.low, self.high - self.low, torch.ones_like(self.low))
        index = ((rows - self.low[:, None]) * (self.bins / width)[:, None]).long()
        index.clamp_(0, self.bins - 1)
        index += torch.arange(len(self.low))[:, None] * self.bins
        self.counts += torch.bincount(index.flatten(), minlength=self.counts.numel()).reshape(
            self.counts.shape
        )


class _Sample:
    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.rows = torch.empty(0)

    def update(self, x: Tensor) -> None:
        rows = x.movedim(self.axis, -1).flatten(0, -2)
        index = torch.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).long()
        self.rows = rows[index]


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """The values as (C, many), or (1, all) without a channel axis."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


class _Recorder(fx.Interpreter):
    """Runs a graph and shows watched values to their observers; nothing is kept."""

    def __init__(self, module: fx.GraphModule, observers: dict[str, list[Any]]) -> None:
        super().__init__(module)
        self.observers = observers

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for observer in self.observers.get(n.name, ()):
            observer.update(result)
        return result


@torch.no_grad()
def collect_histograms(
    graph_module: fx.GraphModule,
    watches: Iterable[Watch],
    batches: Callable[[], Iterable[Tensor]],
    progress: Callable[[int], None] | None = None,
) -> dict[Watch, Histogram]:
    """Run the images twice through the float graph: once for extremes, once for histograms.

    Memory: one batch's activations plus ``TENSOR_BINS`` floats a tensor and ``CHANNEL_BINS``
    a channel, whatever the number of images.

    Args:
        batches: gives a fresh iterator of float32 (N, 3, S, S) batches each time.
        progress: called with the number of images done, over both passes.
    """
    watches = list(watches)
    extremes = {watch: _Extremes(watch.channel_axis) for watch in watches}
    _run(graph_module, extremes, batches(), progress)
    counts = {watch: _Counts(extremes[watch]) for watch in watches}
    _run(graph_module, counts, batches(), progress)
    return {watch: Histogram(c.low, c.high, c.counts) for watch, c in counts.items()}


@torch.no_grad()
def sample_rows(
    graph_module: fx.GraphModule, axes: Mapping[str, int], batch: Tensor
) -> dict[str, Tensor]:
    """At most ``SAMPLE_ROWS`` evenly spread vectors of some nodes' outputs, channels last.

    Args:
        axes: channel axis by node name.
        batch: float32 (N, 3, S, S).
    """
    samples = {Watch(name, axis): _Sample(axis) for name, axis in axes.items()}
    if samples:
        _run(graph_module, samples, [batch], None)
    return {watch.node: sample.rows for watch, sample in samples.items()}


def _run(
    graph_module: fx.GraphModule,
    observers: Mapping[Watch, Any],
    batches: Iterable[Tensor],
    progress: Callable[[int], None] | None,
) -> None:
    by_node: dict[str, list[Any]] = {}
    for watch, observer in observers.items():
        by_node.setdefault(watch.node, []).append(observer)
    recorder = _Recorder(graph_module, by_node)
    for batch in batches:
        recorder.run(batch)
        if progress is not None:
            progress(len(batch))
