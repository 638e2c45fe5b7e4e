"""What is changed in a quantised graph before Core ML's converter sees it."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from torch import fx

from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit
from deploykit.graph.edit import clean, constant, is_op

__all__ = ["minimum_target", "prepared"]

aten = torch.ops.aten
_MOST_AXES = 5
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
_OPS = torch.ops.deploykit
_QUANTIZERS = (
    _OPS.fake_quantize.default,
    _OPS.fake_quantize_log.default,
    _OPS.fake_quantize_twin.default,
)


def minimum_target(graph_module: fx.GraphModule) -> int:
    """The oldest iOS whose Core ML has the operators that the graph needs.

    16 has 8-bit weights (``constexpr_affine_dequantize``), 17 quantised activations
    (``quantize``), 18 four-bit weights (``constexpr_blockwise_shift_scale``).
    """
    nodes = list(graph_module.graph.nodes)
    if any(is_op(node, _OPS.dequantize.default) and node.args[3] <= 4 for node in nodes):
        return 18
    return 17 if any(is_op(node, *_QUANTIZERS) for node in nodes) else 16


def prepared(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes the same in operators that Core ML likes.

    - ``x @ W^T + b`` with quantised weights is one linear layer again. The quantised graph stores
      the weights of such layers transposed, (in, out), because other runtimes want a product.
      Core ML wants (out, in): its ``linear`` takes compressed weights and has a bias. The codes
      are the same, in another order.
    - Tensors have at most five axes, Core ML's limit, where windows are cut out of images by a
      permutation of six.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own pytree warns about itself when copied
        result = copy.deepcopy(graph_module)
    for node in list(result.graph.nodes):
        if is_op(node, aten.matmul.default) and is_op(node.args[1], _OPS.dequantize.default):
            _make_linear(result, node)
        elif is_op(node, aten.permute.default) and len(node.args[1]) > _MOST_AXES:
            _merge_axes(node)
    clean(result)
    return result


def _make_linear(graph_module: fx.GraphModule, product: fx.Node) -> None:
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    codes_node, scale, axis, bits = weight.args
    codes = constant(graph_module, codes_node)
    assert isinstance(codes_node, fx.Node)
    if codes is None or codes.ndim != 2 or axis != 1:
        return
    if len(codes_node.users) > 1 or len(weight.users) > 1:
        return
    setattr(graph_module, str(codes_node.target), codes.t().contiguous())
    weight.args = (codes_node, scale, 0, bits)
    last, bias = _bias_of(graph_module, product, codes.shape[1])
    with graph_module.graph.inserting_before(last):
        linear = graph_module.graph.call_function(
            aten.linear.default, (product.args[0], weight, bias)
        )
    linear.meta = dict(product.meta)
    last.replace_all_uses_with(linear)


def _bias_of(
    graph_module: fx.GraphModule, product: fx.Node, outputs: int
) -> tuple[fx.Node, fx.Node | None]:
    """The node whose value the linear layer has, and its bias, if it has one."""
    users = list(product.users)
    if len(users) == 1 and is_op(users[0], aten.add.Tensor) and not users[0].kwargs:
        left, right = users[0].args
        bias = constant(graph_module, right)
        if left is product and bias is not None and bias.shape == (outputs,):
            assert isinstance(right, fx.Node)
            return users[0], right
    return product, None


def _merge_axes(permute: fx.Node) -> None:
    """Permute with fewer axes: those that stay neighbours, in order, move as one.

    Only between two reshapes, which then don't notice. At most one of the merged axes may have a
    size that isn't a number, such as the batch.
    """
    source, axes = permute.args
    assert isinstance(axes, list | tuple)
    order = [axis for axis in axes if isinstance(axis, int)]
    if not is_op(source, *_RESHAPES):
        return
    assert isinstance(source, fx.Node)
    if not all(is_op(user, *_RESHAPES, aten.flatten.using_ints) for user in permute.users):
        return
    runs: list[list[int]] = []
    for axis in order:
        if runs and runs[-1][-1] + 1 == axis:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    in_place = sorted(runs)
    sizes = source.args[1]
    assert isinstance(sizes, list | tuple)
    if len(sizes) != len(order):
        return
    shape = [_product([sizes[axis] for axis in run]) for run in in_place]
    if len(runs) > _MOST_AXES or shape.count(-1) > 1:
        return
    graph = permute.graph
    for user in list(permute.users):
        if is_op(user, aten.flatten.using_ints):
            _flatten_as_reshape(user, [sizes[axis] for axis in order])
    with graph.inserting_before(permute):
        merged = graph.call_function(aten.reshape.default, (source.args[0], shape))
        moved = graph.call_function(
            aten.permute.default, (merged, [in_place.index(run) for run in runs])
        )
    permute.replace_all_uses_with(moved)


def _flatten_as_reshape(flatten: fx.Node, sizes: list[Any]) -> None:
    """``flatten`` of a tensor of these sizes, in terms that don't depend on its input's axes."""
    given: tuple[Any, ...] = flatten.args[1:]
    first, last = ((*given, *(0, -1)[len(given) :])[i] % len(sizes) for i in (0, 1))
    shape = [*sizes[:first], _product(sizes[first : last + 1]), *sizes[last + 1 :]]
    flatten.target = aten.reshape.default
    flatten.args = (flatten.args[0], shape)


def _product(sizes: list[object]) -> int:
    """-1 (for the reshape to find out) unless all are numbers."""
    known = [size for size in sizes if isinstance(size, int) and size >= 0]
    return math.prod(known) if len(known) == len(sizes) else -1
