"""What comes before images are looked at: the folds that need none, and every layer's plan."""

from __future__ import annotations

from torch import fx

from deploykit.graph.quantized import FLOAT, LayerPlan
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.equalize import equalize_layers
from deploykit.quant.folds.scalars import absorb_scalars
from deploykit.quant.options import QuantizeOptions
from deploykit.quant.plan import plan_layers
from deploykit.types import PassRecord

__all__ = ["fold_layers", "planned"]


def planned(graph_module: fx.GraphModule, options: QuantizeOptions) -> dict[str, LayerPlan]:
    """Every layer's plan, by node name."""
    found = plan_layers(
        graph_module,
        options.weight_bits,
        options.input_bits,
        edge_bits=options.edge_bits,
        keep_8bit=options.keep_8bit,
        float_layers=options.float_layers,
        layer_bits=options.layer_bits,
    )
    return {plan.node: plan for plan in found}


def fold_layers(graph_module: fx.GraphModule, options: QuantizeOptions) -> list[PassRecord]:
    """Fold BatchNorm and the scaling of queries, and equalise layers, in place."""
    records = []
    folded = fold_batch_norm(graph_module)
    if folded.folded or folded.kept:
        summary = f"{folded.folded} BatchNorm layers folded, {len(folded.kept)} kept"
        records.append(PassRecord(name="fold_batch_norm", summary=summary, details=folded.kept))
    if options.head_fold:
        plans = planned(graph_module, options)
        absorb_scalars(graph_module, {n for n, plan in plans.items() if plan.input_bits != FLOAT})
    if options.equalize:
        report = equalize_layers(graph_module)
        if report.pairs:
            summary = f"{len(report.pairs)} pairs of layers equalised"
            details = {
                "pairs": [list(pair) for pair in report.pairs],
                "declined": report.declined,
                "largest_factor": report.largest_factor,
            }
            records.append(PassRecord(name="equalize", summary=summary, details=details))
    return records
