"""Places in a captured graph where a student can be compared with its teacher.

Both graphs come from one model, so the same module path and operator stand for the same thing,
whatever was pruned or merged in one of them. What has another shape there can't be compared and
is left out.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from deploykit.graph.edit import is_op, layer_name
from deploykit.graph.units import image_nodes

__all__ = [
    "Taps",
    "attention_maps",
    "block_outputs",
    "comparable",
    "embeddings",
    "logits",
    "with_taps",
]

aten = torch.ops.aten

_SAME_VALUES = (
    aten.reshape.default,
    aten.expand.default,
    aten.clone.default,
    aten.transpose.int,
    aten.permute.default,
)

Taps = dict[str, fx.Node]
"""Name of a place, the same in teacher and student, and the node whose value is compared."""


def logits(graph: fx.Graph) -> Taps:
    """The graph's output, (N, classes)."""
    (output,) = [node for node in graph.nodes if node.op == "output"]
    (result,) = torch.utils._pytree.tree_leaves(output.args)
    return {"logits": result}


def embeddings(graph: fx.Graph) -> Taps:
    """What the classifiers read, by the classifier's module path: each image as one vector.

    Several classifiers may be summed or averaged to the logits.
    """
    (last,) = logits(graph).values()
    found: Taps = {}
    seen, waiting = {last}, [last]
    while waiting:
        node = waiting.pop()
        if is_op(node, aten.linear.default, aten.convolution.default, aten.conv2d.default):
            found[layer_name(node)] = node.all_input_nodes[0]
            continue
        new = [before for before in node.all_input_nodes if before not in seen]
        seen.update(new)
        waiting += new
    return found


def block_outputs(graph: fx.Graph) -> Taps:
    """Outputs of residual blocks, by module path: the last sum of two activations in a module.

    A network without residual sums has none.
    """
    dependent = image_nodes(graph)
    found: Taps = {}
    for node in graph.nodes:
        if is_op(node, aten.add.Tensor, aten.add_.Tensor, operator.add):
            first, second = node.args[:2]
            if first in dependent and second in dependent and not _is_bias(node):
                found[layer_name(node)] = node
    return found


def attention_maps(graph: fx.Graph) -> Taps:
    """Softmax outputs that are multiplied with values, (N, heads, queries, keys), by module path.

    Several in one module are numbered after the first.
    """
    dependent = image_nodes(graph)
    found: Taps = {}
    for node in graph.nodes:
        if not is_op(node, aten.softmax.int, aten._softmax.default) or node not in dependent:
            continue
        value = node.meta.get("val")
        if node.args[1] not in (-1, *([] if value is None else [value.ndim - 1])):
            continue  # keys are its last dimension
        if not any(is_op(user, aten.matmul.default, aten.bmm.default) for user in _readers(node)):
            continue
        name = stem = layer_name(node)
        count = 1
        while name in found:
            name, count = f"{stem}#{count}", count + 1
        found[name] = node
    return found


def with_taps(graph_module: fx.GraphModule, taps: Mapping[str, fx.Node]) -> fx.GraphModule:
    """A copy that returns ``{name: value}`` for the taps; an ordinary module that can be trained.

    Args:
        taps: nodes of ``graph_module``'s graph.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(graph_module.graph, copied)
    graph.output({name: copied[node] for name, node in taps.items()})
    graph.eliminate_dead_code()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own pytree warns about itself when copied
        return fx.GraphModule(copy.deepcopy(graph_module), graph)


@torch.no_grad()
def comparable(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    find: Callable[[fx.Graph], Taps],
    example: Tensor,
) -> tuple[list[str], dict[str, str]]:
    """Which places exist in both graphs with one shape, and why the others are left out.

    Args:
        example: images that both graphs are run on once, float32 (n, 3, S, S).
    """
    shapes = []
    for graph_module in (student, teacher):
        taps = find(graph_module.graph)
        values = with_taps(graph_module, taps)(example) if taps else {}
        shapes.append({name: tuple(value.shape) for name, value in values.items()})
    mine, theirs = shapes
    kept, left_out = [], {}
    for name in dict.fromkeys([*theirs, *mine]):
        if name not in mine:
            left_out[name] = "not in the student"
        elif name not in theirs:
            left_out[name] = "not in the teacher"
        elif mine[name] != theirs[name]:
            left_out[name] = f"student {_shape(mine[name])}, teacher {_shape(theirs[name])}"
        else:
            kept.append(name)
    return kept, left_out


def _shape(shape: tuple[int, ...]) -> str:
    """Without the batch."""
    return "×".join(map(str, shape[1:]))


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users, seen through reshapes (windowed attention folds its windows before the product)."""
    found = []
    for user in node.users:
        if is_op(user, *_SAME_VALUES):
            found += _readers(user)
        else:
            found.append(user)
    return found


def _is_bias(node: fx.Node) -> bool:
    """Whether the sum is of attention logits and something added to them."""
    return any(is_op(user, aten.softmax.int, aten._softmax.default) for user in _readers(node))
