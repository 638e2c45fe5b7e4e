"""Merge tokens in a graph and carry their new number through everything behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from deploykit.errors import one_line
from deploykit.prune.merge_emit import Emitter
from deploykit.prune.merge_match import match, merge
from deploykit.prune.merge_scorers import Halves, Scorer, TokenView
from deploykit.prune.tokens_blocks import AttentionBlock
from deploykit.prune.tokens_errors import BlockedError
from deploykit.prune.tokens_rules import Tokens, changed_axes, op_packet, pass_through
from deploykit.prune.tokens_shapes import ShapeRunner

__all__ = ["Walk"]

aten = torch.ops.aten


class Walk:
    """One pass over a graph, in place.

    Args:
        graph_module: changed in place; worthless after a BlockedError.
        example: an input of the graph.
        blocks: all its attentions.
        amounts: by index of the block, how many tokens merge behind it.
        protected: how many tokens in front never merge.
        scorer: which tokens are alike.
        proportional: later attentions know the sizes.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        example: Tensor,
        blocks: Sequence[AttentionBlock],
        amounts: Mapping[int, int],
        protected: int,
        scorer: Scorer,
        *,
        proportional: bool,
    ) -> None:
        self.graph_module, self.example = graph_module, example
        self.runner = ShapeRunner(graph_module)
        self.old = self.runner.all(example)
        self.new: dict[fx.Node, Any] = {}
        self.tokens: dict[fx.Node, Tokens] = {}
        self.protected, self.scorer, self.proportional = protected, scorer, proportional
        self.merges = {
            block.residual: (block, amounts[index])
            for index, block in enumerate(blocks)
            if block.residual is not None and amounts.get(index, 0) > 0
        }
        self.softmaxes = {block.softmax: block for block in blocks}
        self.contexts = {block.context for block in blocks}
        self.done: list[tuple[str, int, int]] = []

    def run(self) -> list[tuple[str, int, int]]:
        """Do it. Returns each merge: the block's name, tokens before and after.

        Raises:
            BlockedError: something behind the first merge can't take merged tokens.
        """
        for node in list(self.graph_module.graph.nodes):
            self._follow(node)
            if node in self.merges:
                self._merge(node, *self.merges[node])
        return self.done

    def _follow(self, node: fx.Node) -> None:
        merged = list(dict.fromkeys(
            self.tokens[source] for source in node.all_input_nodes if source in self.tokens
        ))  # fmt: skip
        if not merged or node.op == "output":
            self.new[node] = self.old[node]
            return
        if len(merged) > 1:
            raise BlockedError(f"streams of different tokens meet at {node.name}")
        if node in self.softmaxes and self.proportional:
            self._weigh_attention(node, merged[0])
        attention = self._is_attention(node)
        if self._is_token_mean(node):
            self._weigh_mean(node, merged[0])
            return
        tokens = pass_through(node, merged[0], self.old, self.new, self.protected, attention)
        try:
            value = self.runner.run(node, self.new, self.example)
        except Exception as error:  # operators refuse shapes in many ways
            raise BlockedError(self._misfit(node, error)) from error
        self.new[node] = value
        if self._changed(node, value, tokens):
            self.tokens[node] = tokens

    def _is_attention(self, node: fx.Node) -> bool:
        return node in self.softmaxes or node in self.contexts

    def _changed(self, node: fx.Node, value: Any, tokens: Tokens) -> bool:
        """Whether a value has merged tokens; only their axes may have another length."""
        changed = False
        for old, new in zip(tree_leaves(self.old[node]), tree_leaves(value), strict=True):
            if not isinstance(old, Tensor):
                continue
            pairs = set(zip(old.shape, new.shape, strict=False)) - {(n, n) for n in old.shape}
            if old.ndim != new.ndim or not pairs <= {(tokens.before, tokens.after)}:
                shapes = f"{list(old.shape[1:])} became {list(new.shape[1:])}"
                raise BlockedError(f"{shapes} at {node.name}")
            changed = changed or bool(pairs)
        return changed

    def _misfit(self, node: fx.Node, error: Exception) -> str:
        for source in node.all_input_nodes:
            value = self.new.get(source)
            if source in self.tokens or not isinstance(value, Tensor):
                continue
            for tokens in self.tokens.values():
                if tokens.before in value.shape:
                    what = f"a fixed number of {tokens.before} tokens is built into {source.name}"
                    return f"{what} (position bias, rotary embedding or mask)"
        return one_line(error, 160)

    def _weigh_attention(self, softmax: fx.Node, tokens: Tokens) -> None:
        """Proportional attention: the logarithm of each key's size on its logits (ToMe, eq. 1)."""
        logits = softmax.args[0]
        assert isinstance(logits, fx.Node) and tokens.log_sizes is not None
        last = self.old[logits].ndim - 1
        if last not in changed_axes(self.old[logits], self.new[logits]):
            return
        if tokens.first:
            raise BlockedError(f"attention to a part of the tokens at {softmax.name}")
        emit = self._emitter(softmax, self.softmaxes[softmax].name)
        sizes = tokens.log_sizes
        if last == 3:
            sizes = emit(aten.unsqueeze.default, sizes, 1)
        biased = emit(aten.add.Tensor, logits, sizes)
        self.old[biased], self.tokens[biased] = self.old[logits], tokens
        softmax.replace_input_with(logits, biased)

    def _is_token_mean(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        if op_packet(node) != "mean" or not isinstance(source, fx.Node):
            return False
        if self.old[source].ndim != 3 or len(node.args) < 2:
            return False
        dims: Any = node.args[1]
        axes = changed_axes(self.old[source], self.new[source])
        return isinstance(dims, list | tuple) and [d % 3 for d in dims] == list(axes)

    def _weigh_mean(self, node: fx.Node, tokens: Tokens) -> None:
        """A mean over tokens: each counts as often as original tokens are in it."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        (axis,) = changed_axes(self.old[source], self.new[source])
        emit = self._emitter(node, node.name)
        sizes = tokens.sizes
        if tokens.first:
            sizes = emit.slice(sizes, 1, tokens.first)
        if axis == 2:
            sizes = emit(aten.transpose.int, sizes, 1, 2)
        weighted = emit(aten.mul.Tensor, source, sizes)
        keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        total = emit(aten.sum.dim_IntList, weighted, [axis], keep)
        mean = emit(aten.div.Tensor, total, float(tokens.before))
        node.replace_all_uses_with(mean)
        self.old[mean] = self.old[node]
        self.new[node] = self.old[node]

    def _emitter(self, before: fx.Node, name: str) -> Emitter:
        return Emitter(self.runner, self.new, self.example, before, name)

    def _merge(self, residual: fx.Node, block: AttentionBlock, wanted: int) -> None:
        count = self.new[residual].shape[1]
        halves = Halves(self.protected, count)
        r = min(wanted, halves.most)
        if r <= 0:
            return
        earlier = self.tokens.get(residual)
        users = list(residual.users)
        emit = self._emitter(residual.next, block.name)
        key = emit(aten.transpose.int, block.key, -2, -1)
        if len(emit.shape(key)) == 4:
            key = emit(aten.mean.dim, key, [1])
        sizes = None if earlier is None else earlier.sizes
        found = match(emit, TokenView(key, block.softmax, sizes), halves, r, self.scorer)
        merged, sizes = merge(emit, found, residual, sizes)
        log_sizes = None
        if self.proportional:
            log_sizes = emit(aten.transpose.int, emit(aten.log.default, sizes), 1, 2)
        self.old[merged] = self.old[residual]
        before = self.old[residual].shape[1]
        self.tokens[merged] = Tokens(before, count - r, 0, sizes, log_sizes)
        for user in users:
            user.replace_input_with(residual, merged)
        self.done.append((block.name, count, count - r))
