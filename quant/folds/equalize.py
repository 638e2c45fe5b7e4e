"""Cross-layer equalisation: neighbouring layers share the width of the channels between them.

For ``W2 f(W1 x + b1)`` with ``f(s x) = s f(x)``, channel i of the first layer divided by ``s_i``
and column i of the second multiplied by it leave the result alone. With the ranges ``r1`` and
``r2`` of row and column, ``s_i = sqrt(r1_i / r2_i)`` makes them equal (Nagel et al. 2019,
arXiv 1906.04721, eq. 11).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from deploykit.quant.folds.layers import (
    bias_of,
    channel_axis,
    column_absmax,
    columns,
    is_layer,
    replace_parameters,
    row_absmax,
    weight_of,
)
from deploykit.quant.folds.trace import BlockedError, Trace, readers, table

__all__ = ["EqualizeReport", "equalize_layers"]

# A row or column this small beside its layer's largest is dead: a factor that lifted it would
# blow its bias up with it.
_DEAD = 1e-6


@dataclass(frozen=True)
class EqualizeReport:
    """What cross-layer equalisation did.

    Attributes:
        pairs: names of the layers' nodes, first and second.
        declined: why the other layers' outputs stay, by node name.
        sweeps: how often the chain was gone through.
        largest_factor: greatest of all ``s`` and ``1 / s`` that a channel took in the end.
    """

    pairs: tuple[tuple[str, str], ...]
    declined: dict[str, str]
    sweeps: int
    largest_factor: float


@dataclass(frozen=True)
class _Pair:
    first: fx.Node
    second: fx.Node
    channels: Tensor  # (I,) the first layer's channel at each input channel of the second


def equalize_layers(
    graph_module: fx.GraphModule, *, max_sweeps: int = 50, tolerance: float = 1e-4
) -> EqualizeReport:
    """Equalise all pairs of layers with nothing or a ReLU between them, in place.

    Run it after ``fold_batch_norm``. ReLU6 and other clamps are no such function, since their
    bound doesn't scale, so a layer before one is declined, as is one whose output is read more
    than once. Reshapes and means between the layers are followed. Exact up to float rounding.

    Args:
        max_sweeps: at most so many times over all pairs, which influence each other where a
            layer stands in two.
        tolerance: stop when no factor of a sweep is further than this from 1.
    """
    trace = Trace(graph_module)
    pairs, declined = [], {}
    for node in graph_module.graph.nodes:
        if is_layer(graph_module, node):
            try:
                pairs.append(_pair(trace, node))
            except BlockedError as blocked:
                declined[node.name] = str(blocked)
    # Two pairs may name the same second layer only through different inputs, which it hasn't.
    weights = {n: weight_of(graph_module, n) for p in pairs for n in (p.first, p.second)}
    total = {p.first: torch.ones(len(weights[p.first]), dtype=torch.float64) for p in pairs}
    sweeps, change = 0, float("inf") if pairs else 0.0
    while change > tolerance and sweeps < max_sweeps:
        change = max(_equalize(pair, weights, total) for pair in pairs)
        sweeps += 1
    for node, weight in weights.items():
        bias = bias_of(graph_module, node)
        if node in total and bias is not None:
            bias = bias / total[node]
        replace_parameters(graph_module, node, weight, bias, "equalized")
    graph_module.recompile()
    factors = torch.cat([*total.values(), torch.ones(1, dtype=torch.float64)])
    return EqualizeReport(
        pairs=tuple((pair.first.name, pair.second.name) for pair in pairs),
        declined=declined,
        sweeps=sweeps,
        largest_factor=float(torch.maximum(factors, 1 / factors).max()),
    )


def _pair(trace: Trace, first: fx.Node) -> _Pair:
    """The layer that alone reads a layer's output.

    Raises:
        BlockedError: there is none, or what lies between isn't positively homogeneous.
    """
    node, labels = first, _channel_labels(first, trace.shape(first))
    while True:
        users = readers(node)
        if len(users) != 1:
            raise BlockedError(f"its output is read {len(users)} times")
        (user,) = users
        if is_layer(trace.graph_module, user) and user.args[0] is node:
            channels = table(labels, [channel_axis(user)]).long()
            if bool((channels < 0).any()):
                raise BlockedError("it is joined with something else")
            return _Pair(first, user, channels)
        node, labels = user, trace.step(user, {node: [labels]})[0]


def _channel_labels(layer: fx.Node, shape: torch.Size) -> Tensor:
    """The number of its channel at every element of a layer's output."""
    axis = channel_axis(layer)
    labels = torch.arange(shape[axis], dtype=torch.int32)
    return (labels.reshape(-1, *[1] * (len(shape) - 2)) if axis == 1 else labels).expand(shape)


def _equalize(pair: _Pair, weights: dict[fx.Node, Tensor], total: dict[fx.Node, Tensor]) -> float:
    """Equalise one pair; returns how far its factors are from 1."""
    first, second = weights[pair.first], weights[pair.second]
    row = row_absmax(first)
    per_column = column_absmax(pair.second, second)
    column = torch.zeros_like(row).scatter_reduce(0, pair.channels, per_column, "amax")
    usable = (row > _DEAD * row.max()) & (column > _DEAD * column.max())
    factor = torch.where(usable, (row / column.where(usable, 1.0)).sqrt(), 1.0)
    weights[pair.first] = first / factor.reshape(-1, *[1] * (first.ndim - 1))
    weights[pair.second] = second * columns(pair.second, second, factor[pair.channels])
    total[pair.first] = total[pair.first] * factor
    return float((factor.log()).abs().max())
