"""``deploykit inspect``: what a backbone is made of, and what each technique can reach in it."""

from __future__ import annotations

from collections import Counter

from deploykit.backbones.build import build_backbone
from deploykit.backbones.inspection import Inspection, inspect_backbone
from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel, capture
from deploykit.prune.merge_options import MergeOptions
from deploykit.prune.merge_tokens import mergeable
from deploykit.prune.sparsity_layers import GAIN_CHANNELS, eligible_layers
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.norm import find_norm_groups
from deploykit.quant.plan import plan_layers
from deploykit.recipe import ModelSection

__all__ = ["inspect_model"]


def inspect_model(model: ModelSection, seed: int) -> Inspection:
    """Build, capture and examine a backbone; nothing is written.

    Raises:
        UsageError: unknown name or unusable weights.
        DeploykitError: the model can't be captured.
    """
    backbone, notes = build_backbone(model, seed)
    facts = inspect_backbone(backbone, notes)
    captured = capture(backbone)
    ops = Counter(
        str(getattr(node.target, "__name__", node.target)).split(".")[0]
        for node in captured.graph_module.graph.nodes
        if node.op == "call_function"
    )
    ops.pop("getitem", None)
    reach = _reach(captured)
    reach |= _sparsity(captured) | {"token merging": _merging(captured)}
    if not captured.dynamic_batch:
        notes = [*facts.notes, "the model fixes its batch size at 1"]
        facts = facts.model_copy(update={"notes": notes})
    return facts.model_copy(update={"captured_ops": dict(ops.most_common()), "reach": reach})


def _reach(captured: CapturedModel) -> dict[str, dict[str, int | str]]:
    graph_module = captured.copy().graph_module
    folded = fold_batch_norm(graph_module)
    plans = plan_layers(graph_module, 8, 8)
    groups = find_norm_groups(graph_module)
    foldable = [group for group in groups if group.declined is None]
    declined = Counter(_plain(group.declined) for group in groups if group.declined is not None)
    kinds = Counter(plan.op for plan in plans)
    softmax = sum(plan.softmax_input for plan in plans)
    total = folded.folded + len(folded.kept)
    return {
        "quantised layers": {
            "reaches": len(plans) - kinds["matmul"],
            "of": len(plans) - kinds["matmul"],
            "why": f"{kinds['conv2d']} conv2d, {kinds['linear']} linear",
        },
        "quantised attention matmuls": {
            "reaches": kinds["matmul"],
            "of": kinds["matmul"],
            "why": "",
        },
        "log-quantised softmax": {"reaches": softmax, "of": kinds["matmul"] // 2, "why": ""},
        "BatchNorm fold": {
            "reaches": folded.folded,
            "of": total,
            "why": _counts(Counter(folded.kept.values()), {}),
        },
        "RepQ norm fold": {
            "reaches": len(foldable),
            "of": len(groups),
            "why": _counts(declined, {}),
        },
    }


def _sparsity(captured: CapturedModel) -> dict[str, dict[str, int | str]]:
    """Layers that can be 2:4 sparse, and those of them that hardware may run faster for it."""
    rows = eligible_layers(captured, "2:4")
    fit, gain = [r for r in rows if r.eligible], [r for r in rows if r.gains]
    total = sum(row.weights for row in rows) or 1
    declined = Counter(
        "inputs not / 16 or outputs not / 8" if "wants inputs" in row.reason else row.reason
        for row in rows
        if not row.eligible
    )
    shares = [f"{100 * sum(r.weights for r in part) / total:.0f} %" for part in (fit, gain)]
    return {
        "2:4 sparsity": {
            "reaches": len(fit),
            "of": len(rows),
            "why": "; ".join(filter(None, [f"{shares[0]} of the weights", _counts(declined, {})])),
        },
        "faster by 2:4": {
            "reaches": len(gain),
            "of": len(rows),
            "why": f"{shares[1]} of the weights; NVIDIA only, in and out >= {GAIN_CHANNELS}",
        },
    }


def _merging(captured: CapturedModel) -> dict[str, int | str]:
    """Attention blocks behind which tokens can merge for good."""
    try:
        blocks, protected = mergeable(captured, MergeOptions())
    except UsageError as error:
        return {"reaches": 0, "of": 0, "why": str(error)}
    able = [block for block in blocks if block.residual is not None]
    declined = Counter(block.reason for block in blocks if block.residual is None)
    why = f"{max(block.tokens for block in able)} tokens, {protected} of them never merge"
    return {
        "reaches": len(able),
        "of": len(blocks),
        "why": "; ".join(filter(None, [why, _counts(declined, {})])),
    }


def _plain(reason: str) -> str:
    """A reason without the node's name, so that equal reasons count together."""
    _, found, rest = reason.partition(" reads it")
    return f"another operator reads it{rest}" if found else reason


def _counts(reasons: Counter[str], words: dict[str, str]) -> str:
    return "; ".join(f"{count} x {words.get(why, why)}" for why, count in reasons.most_common())
