"""Which tensors of a captured graph are trained, and which of their zeros stay."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from deploykit.graph.edit import is_op

__all__ = ["hold_zeros", "make_trainable", "named", "write_back"]

aten = torch.ops.aten

_Places = dict[Callable[..., object], tuple[int, ...]]
_LAYERS = (
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.convolution.default,
    aten.addmm.default,
    aten.matmul.default,
)
_PLACES: _Places = dict.fromkeys(_LAYERS, (0, 1, 2))
_NORMS: _Places = {  # positions of the affine weight and bias
    aten.layer_norm.default: (2, 3),
    aten.group_norm.default: (2, 3),
    aten.batch_norm.default: (1, 2),
    aten.rms_norm.default: (2,),
}


def make_trainable(graph_module: fx.GraphModule) -> list[str]:
    """Make the weights of a graph parameters with gradients, in place; freeze everything else.

    Trained are float parameters, and float buffers where a layer or a norm uses them as weight or
    bias (passes leave changed weights as buffers). BatchNorm's statistics stay what they are: a
    captured graph has it in inference form.

    Returns:
        The names of what is trained, in the graph's order.
    """
    statistics = _names(graph_module.graph, {aten.batch_norm.default: (3, 4)})
    used = _names(graph_module.graph, _PLACES | _NORMS)
    for parameter in graph_module.parameters():
        parameter.requires_grad_(False)
    made: dict[int, nn.Parameter] = {}  # one for a tensor that several names share
    names = []
    for name in dict.fromkeys(
        str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"
    ):
        owner, leaf = _owner(graph_module, name)
        value = getattr(owner, leaf)
        if not isinstance(value, Tensor) or not value.is_floating_point() or name in statistics:
            continue
        if not isinstance(value, nn.Parameter) and name not in used:
            continue
        if id(value) not in made:
            made[id(value)] = nn.Parameter(value.detach().clone())
            names.append(name)
        delattr(owner, leaf)
        owner.register_parameter(leaf, made[id(value)])
    return names


def hold_zeros(graph_module: fx.GraphModule) -> dict[str, float]:
    """Make zeros in the weights of layers stay zero while they are trained.

    Their gradient is set to zero, so AdamW's moments are zero there, and its step (and its decay
    of a zero) leaves them exactly where they are.

    Returns:
        The share of zeros by the weight's name, for weights that have any.
    """
    found = {}
    for name in _names(graph_module.graph, _PLACES):
        owner, leaf = _owner(graph_module, name)
        weight = getattr(owner, leaf)
        if not weight.requires_grad or weight.ndim < 2:
            continue
        keep = weight.detach() != 0
        if not bool(keep.all()):
            found[name] = 1 - float(keep.float().mean())
            weight.register_hook(_Mask(keep))
    return found


class _Mask:
    """A gradient, but zero where the mask is False."""

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.keep.device != gradient.device:
            self.keep = self.keep.to(gradient.device)
        return gradient * self.keep


def named(graph_module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The tensors of these names, detached."""
    return {name: operator.attrgetter(name)(graph_module).detach() for name in names}


@torch.no_grad()
def write_back(graph_module: fx.GraphModule, weights: dict[str, Tensor]) -> None:
    """Give a captured graph trained values; its parameters and buffers stay what they are."""
    for name, value in weights.items():
        operator.attrgetter(name)(graph_module).copy_(value)


def _names(graph: fx.Graph, places: _Places) -> set[str]:
    """Names of tensors that stand at these positions of these operators."""
    found = set()
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in places:
            continue
        for place in places[node.target]:
            value = node.args[place] if place < len(node.args) else None
            while is_op(value, aten.t.default, aten.transpose.int, aten.permute.default):
                value = value.args[0]  # type: ignore[union-attr]
            if isinstance(value, fx.Node) and value.op == "get_attr":
                found.add(str(value.target))
    return found


def _owner(graph_module: fx.GraphModule, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return graph_module.get_submodule(owner), leaf
