"""A classifier that knows some of its classes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.graph.edit import add_tensor, clean, constant, is_op

__all__ = ["select_classes"]

aten = torch.ops.aten


def select_classes(captured: CapturedModel, classes: Sequence[int]) -> CapturedModel:
    """The same model with logits (N, len(classes)) of these classes, in this order.

    Rows of the last linear layer go for good; where another operator comes last (the mean of a
    distilled model's two heads), the logits are picked from its output instead.

    Raises:
        UsageError: a class the model doesn't have, or one twice.
    """
    known = captured.backbone.num_classes
    odd = [c for c in classes if not 0 <= c < known]
    if odd or len(set(classes)) != len(classes) or not classes:
        what = (
            f"class {odd[0]}" if odd else f"{len(classes)} classes, {len(set(classes))} different"
        )
        raise UsageError(
            f"model.classes: wanted different classes from 0 to {known - 1}, got {what}"
        )
    model = captured.copy()
    graph = model.graph_module.graph
    output = next(node for node in graph.nodes if node.op == "output")
    logits = _logits(output)
    index = torch.tensor(list(classes), dtype=torch.int64)
    if is_op(logits, aten.linear.default) and len(logits.users) == 1:
        for place, argument in enumerate(logits.args[1:], start=1):
            value = constant(model.graph_module, argument)
            if value is not None:
                new = add_tensor(model.graph_module, str(argument), value[index], logits)
                logits.update_arg(place, new)
    else:
        chosen = add_tensor(model.graph_module, "classes", index, output)
        with graph.inserting_before(output):
            picked = graph.call_function(aten.index_select.default, (logits, 1, chosen))
        output.replace_input_with(logits, picked)
    clean(model.graph_module)
    return replace(model, backbone=replace(model.backbone, num_classes=len(classes)))


def _logits(output: fx.Node) -> fx.Node:
    value = output.args[0]
    value = value[0] if isinstance(value, (tuple, list)) else value
    assert isinstance(value, fx.Node)
    return value
