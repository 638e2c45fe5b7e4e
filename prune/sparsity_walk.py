"""Through the network once, layer by layer: what reaches each, then its new weight, then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from deploykit.graph.edit import constant
from deploykit.graph.execute import Executor, Run
from deploykit.graph.units import split_units
from deploykit.prune.sparsity_statistics import InputStatistics

__all__ = ["walk_layers"]

LIVE_BYTES = 2**30  # of values kept between two layers of a unit, over all images

Visit = Callable[[fx.Node, Tensor, InputStatistics], None]


@torch.no_grad()
def walk_layers(
    graph_module: fx.GraphModule,
    layers: Sequence[str],
    images: Sequence[Tensor],
    visit: Visit,
    *,
    gram: bool,
    advance: Callable[[float], None],
) -> None:
    """Show every layer, in the order they run, what reaches it.

    The images go through the network once. They stop before each layer together; its inputs are
    summed up; ``visit`` may then write to its weight, and everything after it sees the new one.
    Where too much would have to be kept meanwhile, the images begin the unit (about a block of
    the network) anew.

    Memory: all images' activations at one point of the network, ``LIVE_BYTES``, and one layer's
    statistics.

    Args:
        layers: names of nodes.
        images: batches, float32 (N, 3, S, S).
        visit: takes the layer's node, its weight and the statistics of its inputs.
        gram: whether Gram matrices are wanted.
        advance: called with 1 for each layer.
    """
    executor = Executor(graph_module)
    for batch in images:
        executor.prepare(batch)
    counts, values = [len(batch) for batch in images], list(images)
    share = LIVE_BYTES // len(images)
    for unit in split_units(graph_module.graph, set(layers)):
        runs = [
            Run(executor, unit.nodes, unit.source, value, count)
            for value, count in zip(values, counts, strict=True)
        ]
        nodes = {node.name: node for node in unit.nodes}
        for name in unit.layers:
            node = nodes[name]
            weight = constant(graph_module, node.args[1])
            assert weight is not None
            statistics = InputStatistics(node, weight, gram=gram)
            for run in runs:
                statistics.update(run.before(node, {}))
                if run.live_bytes > share:
                    run.rewind()
            statistics.check()
            visit(node, weight, statistics)
            advance(1)
        values = [run.finish({}) for run in runs]
