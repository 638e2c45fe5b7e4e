"""Shapes of convolutions and matrix products: by these a kernel is found for its layer.

A product is (1, M, K, N) however torch runs it, (B, M, K, N) if it is B products; a convolution is
the shapes of its input and of its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from deploykit.targets.profiling.torch_events import kind_of
from deploykit.targets.profiling.torch_source import operator_of
from deploykit.targets.registry import FloatArray
from deploykit.targets.torch_graph import import_torch

__all__ = ["Product", "product", "product_of", "products_of_graph"]

Product = tuple[str, tuple[int, ...]]

_SUMMED = ("addmm", "baddbmm")  # what is added comes first


def product_of(event: Any) -> Product | None:
    """Of an operator's event; None if its shapes are none of a product's."""
    return product(event.name, [tuple(shape) for shape in event.input_shapes or ()])


def product(operator: str, shapes: Sequence[Sequence[int]]) -> Product | None:
    """What ``aten::addmm`` and the like compute of tensors of these shapes, in their order.

    None if it is no convolution and no product of two tensors.
    """
    name = operator.partition("::")[2].strip("_")
    shapes = shapes[1:] if name in _SUMMED else shapes
    if len(shapes) < 2 or not shapes[0] or not shapes[1]:
        return None
    left, right = shapes[0], shapes[1]
    if "conv" in name:
        return ("convolution", (*left, *right))
    if "attention" in name:
        return ("attention", (*left, *right))
    if "linear" in name:
        right = (right[-1], right[0])
    if len(left) < 2 or len(right) < 2:
        return None
    rows, inner, columns = math.prod(left[:-1]), left[-1], right[-1]
    if len(right) == 2:
        return ("product", (1, rows, inner, columns))
    batch = max(math.prod(left[:-2]), math.prod(right[:-2]))  # either may be broadcast
    return ("product", (batch, left[-2], inner, columns))


def products_of_graph(graph_module: Any, images: FloatArray) -> dict[str, Product]:
    """The products that a saved graph's computing nodes are, by node, in order.

    Args:
        graph_module: a saved graph (``torch.fx.GraphModule``); it is run once.
        images: float32 (N, 3, S, S).
    """
    torch: Any = import_torch()
    interpreter: Any = torch.fx.Interpreter
    found: dict[str, Product] = {}

    class Shapes(interpreter):  # type: ignore[misc]
        def run_node(self, n: Any) -> Any:
            operator = operator_of(n)
            if kind_of(operator) == "compute":
                tensors = [self.env[arg] for arg in n.args if isinstance(arg, torch.fx.Node)]
                shaped = product(operator, [tuple(tensor.shape) for tensor in tensors])
                found[n.name] = shaped or ("unknown", (len(found),))
            return super().run_node(n)

    batch = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    with torch.inference_mode():
        Shapes(graph_module).run(batch.to(next(iter(graph_module.parameters()), batch).device))
    return found
