"""Whether a loaded graph can be run at all, found out without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from deploykit.errors import one_line
from deploykit.export.structure_args import BadArgumentError
from deploykit.graph.levels import level_nodes
from deploykit.types import FeatureLevel

__all__ = ["check_shapes"]

_MOST_ELEMENTS = 2**31  # of one value; far above any backbone's, far below what ends a machine


def check_shapes(
    graph_module: fx.GraphModule, size: int, levels: Sequence[FeatureLevel] = ()
) -> None:
    """Follow the shapes of one image through the graph.

    Raises:
        BadArgumentError: an operator refuses its arguments, a value would be too large, the
            output isn't float32 (1, classes), or the feature maps aren't the ``levels``.
    """
    follow = _Follow(graph_module)
    follow.extra_traceback = False  # errors stay as they are: one line is made of them
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            result = follow.run(torch.empty(1, 3, size, size))
    except BadArgumentError:
        raise
    except Exception as error:  # operators refuse arguments in many ways
        message = f"a graph that can't be run ({one_line(error, 160)})"
        raise BadArgumentError(message) from error
    right = isinstance(result, Tensor) and result.dtype == torch.float32
    if not right or result.ndim != 2 or result.shape[0] != 1:
        raise BadArgumentError("a graph whose output for one image isn't float32 (1, classes)")
    maps = [tuple(follow.seen.get(node, ())) for node in level_nodes(graph_module.graph)]
    if maps != [(1, level.channels, level.height, level.width) for level in levels]:
        raise BadArgumentError("feature maps of other shapes than the levels listed")


class _Follow(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.seen[n] = result.shape
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.numel() > _MOST_ELEMENTS:
                raise BadArgumentError(f"a value of {value.numel()} elements at {n.name}")
        return result
