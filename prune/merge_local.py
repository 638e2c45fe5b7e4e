"""Local merging: fewer tokens inside an MLP only, so that any layout of them survives.

Windows, maps of a hybrid's stages and dense outputs need every token at its place. There tokens
merge in front of an MLP and each gets the result of what it merged into behind it, before the
residual sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, prod
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.graph.edit import is_op, layer_name
from deploykit.graph.units import image_nodes
from deploykit.prune.merge_emit import Emitter
from deploykit.prune.merge_match import match, merge, unmerge
from deploykit.prune.merge_scorers import Halves, Scorer, TokenView
from deploykit.prune.tokens_shapes import ShapeRunner

__all__ = ["LocalBlock", "find_local_blocks", "merge_locally"]

aten = torch.ops.aten

_ACTIVATIONS = (aten.gelu.default, aten.relu.default, aten.silu.default, aten.hardswish.default)
_BETWEEN = (aten.layer_norm.default, aten.mul.Tensor, aten.clone.default, *_ACTIVATIONS)


@dataclass(frozen=True)
class LocalBlock:
    """LayerNorm, linear, activation, linear: computed for each token by itself.

    Attributes:
        name: the first linear layer's.
        first: the node that reads the tokens.
        source: the tokens, (B, N, C) or (B, H, W, C).
        result: the sub-block's last node, of the same shape.
        tokens: N, or H W.
        macs: multiply-adds a token takes.
    """

    name: str
    first: fx.Node
    source: fx.Node
    result: fx.Node
    tokens: int
    macs: int

    def saved(self, channels: int, r: int) -> int:
        """Multiply-adds that merging ``r`` tokens saves here, less what it costs itself."""
        half = self.tokens // 2
        kept, rows = half - r, self.tokens - r
        matching = half * half * channels
        merging = (kept + half) * half * (channels + 1)
        return r * self.macs - matching - merging - rows * half * channels


def find_local_blocks(graph: fx.Graph, values: dict[fx.Node, Any]) -> list[LocalBlock]:
    """Every MLP between a stream of tokens and its residual sum."""
    from_image = image_nodes(graph)
    found = []
    for node in graph.nodes:
        if not is_op(node, aten.add.Tensor) or len(node.all_input_nodes) != 2:
            continue
        for result in node.all_input_nodes:
            (source,) = [other for other in node.all_input_nodes if other is not result]
            block = _block(result, source, values, from_image)
            if block is not None:
                found.append(block)
    return found


def _block(
    result: fx.Node, source: fx.Node, values: dict[fx.Node, Any], from_image: set[fx.Node]
) -> LocalBlock | None:
    node, linears, active, macs = result, [], False, 0
    shape = values[source].shape if isinstance(values[source], Tensor) else ()
    if len(shape) not in (3, 4):
        return None
    while node is not source:
        data = [n for n in node.all_input_nodes if n in from_image]
        if len(data) != 1 or len(node.users) != 1:
            return None
        if is_op(node, aten.linear.default):
            linears.append(node)
            macs += prod(values[node.all_input_nodes[1]].shape)
        elif not is_op(node, *_BETWEEN) or not _per_channel(node, data[0], values):
            return None
        active = active or is_op(node, *_ACTIVATIONS)
        first, node = node, data[0]
    norm_ok = not is_op(first, aten.layer_norm.default) or len(first.args[1]) == 1  # type: ignore[arg-type]
    if len(linears) < 2 or not active or not norm_ok or values[result].shape != shape:
        return None
    return LocalBlock(
        layer_name(linears[-1]), first, source, result, prod(shape[1:-1]), macs
    )  # fmt: skip


def _per_channel(node: fx.Node, data: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether whatever else an operator reads is the same for all tokens."""
    for other in node.all_input_nodes:
        if other is not data and prod(values[other].shape[:-1]) != 1:
            return False
    return True


def merge_locally(
    graph_module: fx.GraphModule,
    example: Tensor,
    wanted: Sequence[int | float],
    scorer: Scorer,
    least_tokens: int,
) -> tuple[list[tuple[str, int, int]], dict[str, str]]:
    """Merge in front of each MLP and copy back behind it, in place.

    Tokens are compared by what the MLP reads. No token needs protection: each keeps its place.

    Args:
        wanted: by MLP, how many tokens merge; a float is a share.

    Returns:
        Each merge (name, tokens before and inside), and what was declined and why.
    """
    runner = ShapeRunner(graph_module)
    values = runner.all(example)
    done, declined = [], {}
    for block, want in zip(find_local_blocks(graph_module.graph, values), wanted, strict=True):
        r = floor(want * block.tokens) if isinstance(want, float) else want
        r = min(r, Halves(0, block.tokens).most)
        saved = block.saved(values[block.source].shape[-1], r)
        if r <= 0:
            continue
        if block.tokens < least_tokens:
            declined[block.name] = f"{block.tokens} tokens, under {least_tokens}"
        elif saved <= 0:
            declined[block.name] = f"merging {r} of {block.tokens} tokens costs {-saved} more MACs"
        else:
            _merge(runner, values, example, block, r, scorer)
            done.append((block.name, block.tokens, block.tokens - r))
    return done, declined


def _merge(
    runner: ShapeRunner,
    values: dict[fx.Node, Any],
    example: Tensor,
    block: LocalBlock,
    r: int,
    scorer: Scorer,
) -> None:
    emit = Emitter(runner, values, example, block.first, block.name)
    shape = values[block.source].shape
    x = block.source
    if len(shape) == 4:
        x = emit(aten.flatten.using_ints, x, 1, 2)
    halves = Halves(0, block.tokens)
    found = match(emit, TokenView(x, None, None), halves, r, scorer)
    merged, _ = merge(emit, found, x, None)
    node, behind = block.first, block.result.next
    node.replace_input_with(block.source, merged)
    while True:  # the sub-block itself, on fewer tokens
        values[node] = runner.run(node, values, example)
        if node is block.result:
            break
        (node,) = node.users
    users = list(block.result.users)
    emit = Emitter(runner, values, example, behind, block.name)
    result = unmerge(emit, found, block.result)
    if len(shape) == 4:
        result = emit(aten.unflatten.int, result, 1, [int(size) for size in shape[1:3]])
    for user in users:
        user.replace_input_with(block.result, result)
