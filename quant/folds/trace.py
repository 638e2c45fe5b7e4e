"""Follow channels through the operators that only move, scale, add or pool them.

Which channel lands where is found by running the operators themselves on tensors filled with
channel numbers ("labels"), never by names or by knowing a family's reshapes. A node's labels are
a list: an element that is a sum of several channels (as under a rotary embedding) has one label
in each entry; -1 marks values that come from elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg

from deploykit.graph.edit import constant, is_op
from deploykit.quant.folds.layers import is_layer, op_name

__all__ = ["BlockedError", "Labels", "Trace", "keeps_shift", "readers", "table"]

aten = torch.ops.aten

Labels = list[Any]  # each entry a Tensor, or the tuple of Tensors that a split gives

_MOVES = (
    operator.getitem,
    aten.transpose.int,
    aten.t.default,
    aten.mT.default,
    aten.numpy_T.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.permute.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.expand.default,
    aten.repeat.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.select.int,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.roll.default,
    aten.flip.default,
    aten.index_select.default,
    aten.index.Tensor,
    aten.pixel_unshuffle.default,
    aten.contiguous.default,
    aten.clone.default,
)
_SAME = (aten.to.dtype, aten.type_as.default, aten.alias.default, aten.detach.default)
_RESHAPED_LIKE = (aten.reshape_as.default, aten.view_as.default, aten.expand_as.default)
_JOINS = (aten.cat.default, aten.stack.default)
# f(a x) = a f(x) for a > 0, element by element
_HOMOGENEOUS = (
    aten.neg.default,
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
)
_PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor, aten.div.Tensor, aten.div_.Tensor)
_SUMS = (aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor)
_MEANS = (aten.mean.dim, aten.adaptive_avg_pool2d.default)
_POOLS = (aten.avg_pool2d.default, aten.max_pool2d.default, aten.avg_pool1d.default)
# Operators that look at a tensor's shape or type but not at its values.
_SHAPE_ONLY = (aten.sym_size.int, aten._assert_tensor_metadata.default)
_SECOND_IS_SHAPE = (*_RESHAPED_LIKE, aten.type_as.default)
_KNOWN = (
    *_MOVES, *_SAME, *_RESHAPED_LIKE, *_JOINS, *_HOMOGENEOUS, *_PRODUCTS, *_SUMS, *_MEANS,
    *_POOLS, aten.pad.default,
)  # fmt: skip


class BlockedError(Exception):
    """Channels can't be followed further; the message says why."""


def readers(node: fx.Node) -> list[fx.Node]:
    """The users that read a node's values, not only its shape or type."""
    return [
        user
        for user in node.users
        if not is_op(user, *_SHAPE_ONLY)
        and not (is_op(user, *_SECOND_IS_SHAPE) and user.args[0] is not node)
    ]


def table(labels: Tensor, keep: Iterable[int]) -> Tensor:
    """Labels as a function of the axes in ``keep`` alone, in their order.

    Raises:
        BlockedError: they vary along another axis too.
    """
    kept = [axis % labels.ndim for axis in keep]
    others = [axis for axis in range(labels.ndim) if axis not in kept]
    moved = labels.permute(*kept, *others)
    moved = moved.flatten(len(kept)) if others else moved[..., None]
    result: Tensor = moved[..., 0]
    if not bool((moved == moved[..., :1]).all()):
        raise BlockedError("its channels do not lie along one axis")
    return result


class Trace:
    """Shapes of a graph's values, and labels pushed through its operators."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module

    @cached_property
    def shapes(self) -> dict[fx.Node, Any]:
        """Shape of every tensor and value of every number, at batch 2 where it is dynamic."""
        return _Recorder(self.graph_module).record()

    @cached_property
    def data(self) -> set[fx.Node]:
        """Nodes whose values depend on the image (an expanded class token's don't)."""
        found: set[fx.Node] = set()
        for node in self.graph_module.graph.nodes:
            if node.op == "placeholder" or (
                not is_op(node, *_SHAPE_ONLY)
                and any(source in found and node in readers(source)
                        for source in node.all_input_nodes)
            ):  # fmt: skip
                found.add(node)
        return found

    def shape(self, node: fx.Node) -> torch.Size:
        shape = self.shapes[node]
        if not isinstance(shape, torch.Size):
            raise BlockedError(f"{node.name} is no tensor")
        return shape

    def parts(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that carry data, if labels can pass the node.

        Raises:
            BlockedError: they can't, or a constant is added.
        """
        sources = [n for n in node.all_input_nodes if n in self.data and node in readers(n)]
        if not is_op(node, *_KNOWN):
            raise BlockedError(f"{op_name(node)} stands between")
        if is_op(node, *_PRODUCTS) and (len(sources) != 1 or node.args[0] is node.args[1]):
            raise BlockedError("a product of two activations stands between")
        if is_op(node, *_SUMS) and len(sources) != 2:
            raise BlockedError("a constant is added in between")
        return sources

    def step(self, node: fx.Node, known: dict[fx.Node, Labels]) -> Labels:
        """Labels of a node from those of its inputs; inputs that have none count as foreign.

        Raises:
            BlockedError: the operator does more with channels than move, scale, add or pool.
        """
        if node.op == "output":
            raise BlockedError("it is a result of the graph")
        inputs = [n for n in node.all_input_nodes if n in known]
        first = known[inputs[0]]
        if is_op(node, *_MOVES):
            return [self._run(node, known, path) for path in range(len(first))]
        if is_op(node, aten.pad.default) and not any(node.args[1]):  # type: ignore[arg-type]
            return first
        if is_op(node, *_SAME, *_HOMOGENEOUS):
            return first
        if is_op(node, *_RESHAPED_LIKE):
            shape = self.shape(node)
            as_view = is_op(node, aten.expand_as.default)
            return [e.expand(shape) if as_view else e.reshape(shape) for e in first]
        if is_op(node, *_JOINS):
            count = max(len(known[n]) for n in inputs)
            return [self._run(node, known, path) for path in range(count)]
        if is_op(node, *_PRODUCTS):
            if len(inputs) != 1 or (node.args[0] not in known and is_op(node, *_PRODUCTS[2:])):
                raise BlockedError("a product of two activations stands between")
            return [labels.expand(self.shape(node)) for labels in first]
        if is_op(node, *_SUMS):
            if len(inputs) != 2:
                raise BlockedError("it is added to something else")
            return [labels.expand(self.shape(node)) for n in inputs for labels in known[n]]
        if is_op(node, *_MEANS, *_POOLS):
            return [self._pool(node, labels) for labels in first]
        raise BlockedError(f"{op_name(node)} stands between")

    def layers_after(
        self, start: fx.Node, labels: Tensor
    ) -> Iterator[tuple[fx.Node, Tensor, list[fx.Node]]]:
        """Every layer that reads ``start``, with the labels at its input and the nodes between.

        Raises:
            BlockedError: something that is no layer reads it.
        """
        todo: list[tuple[fx.Node, Labels, list[fx.Node]]] = [(start, [labels], [])]
        while todo:
            node, found, path = todo.pop(0)
            users = readers(node)
            if not users:
                raise BlockedError("nothing reads it")
            for user in users:
                if is_layer(self.graph_module, user) and user.args[0] is node:
                    if len(found) != 1:
                        raise BlockedError("channels are added in between")
                    yield user, found[0], path
                else:
                    todo.append((user, self.step(user, {node: found}), [*path, user]))

    def _run(self, node: fx.Node, known: dict[fx.Node, Labels], path: int) -> Any:
        def value(source: fx.Node) -> Any:
            if source in known:
                entries = known[source]
                return entries[path] if path < len(entries) else entries[0]
            tensor = constant(self.graph_module, source)
            if tensor is not None and not is_op(node, *_JOINS):
                return tensor
            known_value = self.shapes[source]
            if isinstance(known_value, torch.Size):
                if is_op(node, *_JOINS):
                    return torch.full(known_value, -1, dtype=torch.int32)
                raise BlockedError(f"{op_name(node)} depends on another activation")
            return known_value

        assert callable(node.target)
        return node.target(*map_arg(node.args, value), **map_arg(node.kwargs, value))

    def _pool(self, node: fx.Node, labels: Tensor) -> Tensor:
        if is_op(node, aten.mean.dim):
            dims, keep = node.args[1], len(node.args) > 2 and bool(node.args[2])
            low, high = labels.amin(dims, keep), labels.amax(dims, keep)  # type: ignore[arg-type]
        else:
            dims = (-1,) if is_op(node, aten.avg_pool1d.default) else (-2, -1)
            low, high = labels.amin(dims, True), labels.amax(dims, True)
        if not torch.equal(low, high):
            raise BlockedError("its channels are mixed in between")
        return low.expand(self.shape(node))


def keeps_shift(node: fx.Node) -> bool:
    """Whether a constant added to a channel comes out of the node as the same constant."""
    return is_op(node, *_MOVES, *_SAME, *_RESHAPED_LIKE, *_MEANS, *_JOINS) or (
        is_op(node, aten.pad.default) and not any(node.args[1])  # type: ignore[arg-type]
    )


class _Recorder(fx.Interpreter):
    """Runs a graph on fake tensors, which have a shape and no values."""

    def record(self) -> dict[fx.Node, Any]:
        self.found: dict[fx.Node, Any] = {}
        assert isinstance(self.module, fx.GraphModule)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            self.run(*_example(self.module, mode))
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.found[n] = result.shape if isinstance(result, Tensor) else result
        return result


def _example(graph_module: fx.GraphModule, mode: FakeTensorMode) -> list[Tensor]:
    tensors = [*graph_module.parameters(), *graph_module.buffers()]
    kind = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    examples = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            shape = [dim if isinstance(dim, int) else 2 for dim in node.meta["val"].shape]
            with mode:
                examples.append(torch.empty(shape, dtype=kind.dtype, device=kind.device))
    return examples
