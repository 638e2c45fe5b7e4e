"""Token merging: fewer tokens from block to block, in a graph that still exports.

Tokens that are alike become one, behind an attention and before its MLP (ToMe: Bolya et al.,
Token Merging: Your ViT but Faster, ICLR 2023). All shapes stay static but for the batch, and no
operator is needed that a runtime may lack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import floor

import torch
from torch import Tensor, fx

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import clean, is_op
from deploykit.graph.macs import count_macs
from deploykit.prune.merge_local import find_local_blocks, merge_locally
from deploykit.prune.merge_options import MergeOptions, reductions
from deploykit.prune.merge_scorers import Halves, find_scorer
from deploykit.prune.tokens_blocks import AttentionBlock, find_blocks
from deploykit.prune.tokens_errors import BlockedError
from deploykit.prune.tokens_protected import leading_tokens
from deploykit.prune.tokens_shapes import ShapeRunner
from deploykit.prune.tokens_walk import Walk
from deploykit.types import PassRecord

__all__ = ["merge_tokens", "mergeable", "merged_at_any_cost"]

aten = torch.ops.aten
_SOFTMAX = (aten.softmax.int, aten._softmax.default)


def example_of(captured: CapturedModel) -> Tensor:
    """An input to follow shapes with; its batch is like no other size where it is free."""
    return captured.example if captured.dynamic_batch else captured.example[:1]


def mergeable(captured: CapturedModel, options: MergeOptions) -> tuple[list[AttentionBlock], int]:
    """The attention blocks of a model, and how many tokens in front never merge.

    Raises:
        UsageError: no block's tokens can merge, or there are too few; the reason.
    """
    example = example_of(captured)
    values = ShapeRunner(captured.graph_module).all(example)
    blocks = find_blocks(captured.graph_module.graph, values)
    able = [block for block in blocks if block.residual is not None]
    name = captured.backbone.name
    if not blocks:
        raise UsageError(f"tokens of {name} can't be merged: {_without_stream(captured)}")
    if not able:
        first = blocks[0]
        raise UsageError(f"tokens of {name} can't be merged: at {first.name}, {first.reason}")
    most = max(block.tokens for block in able)
    if most < options.least_tokens:
        message = f"merging is refused: {name} has {most} tokens, under {options.least_tokens}"
        raise UsageError(f"{message} matching them costs more time than it saves")
    stream = able[0].stream
    assert stream is not None
    try:
        found = leading_tokens(captured.graph_module, stream, values, example)
    except BlockedError as blocked:
        raise UsageError(f"tokens of {name} can't be merged: {blocked}") from blocked
    protected = found if options.protect is None else options.protect
    if not 0 <= protected < most:
        raise UsageError(f"{protected} of {most} tokens can't be protected")
    return blocks, protected


def _without_stream(captured: CapturedModel) -> str:
    """Why there is no block with a stream of tokens (B, N, C)."""
    attends = any(is_op(node, *_SOFTMAX) for node in captured.graph_module.graph.nodes)
    if attends:
        return "its attention works on a map, which the convolutions around it need whole"
    return "it has no attention"


def merge_tokens(
    captured: CapturedModel, options: MergeOptions
) -> tuple[CapturedModel, PassRecord]:
    """A copy of a model whose blocks merge tokens, and what was done.

    Args:
        captured: left unchanged.

    Raises:
        UsageError: nothing can be merged, or it would cost more than it saves; the reason.
    """
    merged, record = merged_at_any_cost(captured, options)
    old, new = record.details["macs_before"], record.details["macs_after"]
    if record.details["tokens"] and new >= old:
        message = f"merging is refused: matching tokens costs more than is saved ({old} multiply-"
        raise UsageError(f"{message}adds before, {new} after)")
    return merged, record


def merged_at_any_cost(
    captured: CapturedModel, options: MergeOptions
) -> tuple[CapturedModel, PassRecord]:
    """``merge_tokens`` where it saves nothing, too: to measure what merging does.

    Raises:
        UsageError: nothing can be merged.
    """
    scorer = find_scorer(options.scorer)
    if options.place == "local":
        return _merge_locally(captured, options)
    blocks, protected = mergeable(captured, options)
    able = [index for index, block in enumerate(blocks) if block.residual is not None]
    wanted = dict(zip(able, reductions(options, len(able)), strict=True))
    if not any(wanted.values()):
        return captured.copy(), _record(captured, captured, options, [], {}, protected)
    declined = {block.name: block.reason for block in blocks if block.residual is None}
    first_reason = ""
    while able:
        graph_module, nodes = shared_copy(captured.graph_module)
        walk = Walk(
            graph_module,
            example_of(captured),
            [_moved(block, nodes) for block in blocks],
            _amounts(wanted, able, blocks, protected),
            protected,
            scorer,
            proportional=options.proportional_attention,
        )
        try:
            done = walk.run()
        except BlockedError as blocked:
            first_reason = first_reason or str(blocked)
            declined[blocks[able.pop(0)].name] = str(blocked)
            continue
        if not done:
            break
        clean(graph_module)
        merged = replace(captured, graph_module=graph_module)
        return merged, _record(captured, merged, options, done, declined, protected)
    reason = first_reason or "the blocks that the schedule names can't merge"
    raise UsageError(f"tokens of {captured.backbone.name} can't be merged: {reason}")


def _merge_locally(
    captured: CapturedModel, options: MergeOptions
) -> tuple[CapturedModel, PassRecord]:
    example, name = example_of(captured), captured.backbone.name
    values = ShapeRunner(captured.graph_module).all(example)
    found = find_local_blocks(captured.graph_module.graph, values)
    if not found:
        message = f"tokens of {name} can't be merged locally: no MLP of linear layers and a sum"
        raise UsageError(message)
    wanted = reductions(options, len(found))
    graph_module, _ = shared_copy(captured.graph_module)
    done, declined = merge_locally(
        graph_module, example, wanted, find_scorer(options.scorer), options.least_tokens
    )
    if not done and any(wanted):
        block, reason = next(iter(declined.items()), (found[0].name, "the schedule asks for none"))
        raise UsageError(f"local merging of {name} is refused: at {block}, {reason}")
    clean(graph_module)
    merged = replace(captured, graph_module=graph_module)
    return merged, _record(captured, merged, options, done, declined, 0)


def shared_copy(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A graph of its own over the same tensors, and each old node's new one."""
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(graph_module.graph, nodes))
    graph.set_codegen(graph_module.graph._codegen)  # how the output is packed
    return fx.GraphModule(graph_module, graph).eval(), nodes


def _moved(block: AttentionBlock, nodes: dict[fx.Node, fx.Node]) -> AttentionBlock:
    """The same block in a copy of its graph."""
    return replace(
        block,
        key=nodes[block.key],
        softmax=nodes[block.softmax],
        context=nodes[block.context],
        residual=None if block.residual is None else nodes[block.residual],
        stream=None if block.stream is None else nodes[block.stream],
    )


def _amounts(
    wanted: Mapping[int, int | float],
    able: Sequence[int],
    blocks: Sequence[AttentionBlock],
    protected: int,
) -> dict[int, int]:
    """Tokens each block merges: shares become numbers, and at most half of what may merge."""
    amounts, gone = {}, 0
    for index in able:
        left = blocks[index].tokens - gone
        want = wanted[index]
        r = floor(want * left) if isinstance(want, float) else want
        amounts[index] = min(r, Halves(protected, left).most)
        gone += amounts[index]
    return amounts


def _record(
    before: CapturedModel,
    after: CapturedModel,
    options: MergeOptions,
    done: Sequence[tuple[str, int, int]],
    declined: dict[str, str],
    protected: int,
) -> PassRecord:
    """What was merged, and the multiply-adds it saves."""
    size = before.backbone.preprocessing.size
    old, new = (count_macs(model.graph_module, size) for model in (before, after))
    removed = sum(first - last for _, first, last in done)
    local = options.place == "local"
    share = f"{100 * (1 - new / old):.0f} % fewer multiply-adds"
    left = f", {done[-1][2]} are left" if done and not local else ""
    where = "MLPs" if local else "blocks"
    return PassRecord(
        name="merge_tokens",
        summary=f"{removed} tokens merge in {len(done)} {where} ({options.scorer}){left}; {share}",
        details={
            "schedule": options.schedule,
            "scorer": options.scorer,
            "place": options.place,
            "proportional_attention": options.proportional_attention,
            "protected": protected,
            "tokens": {name: [first, last] for name, first, last in done},
            "macs_before": old,
            "macs_after": new,
            "declined": declined,
        },
    )
