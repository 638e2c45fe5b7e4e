"""Budgets of an allocation: what each layer costs at each width, in bits, bytes or milliseconds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import fx

from deploykit.errors import UsageError
from deploykit.graph.edit import constant
from deploykit.quant.allocate import Method, allocate, total
from deploykit.quant.sensitivity import FLOAT_BITS, LayerScores
from deploykit.recipe import parse_bits
from deploykit.report.sensitivity_model import Budget

__all__ = ["BudgetAsked", "allocate_bits", "budget_asked", "parse_bytes", "weight_width"]

Kind = Literal["avg-bits", "max-bytes", "max-latency-ms"]
Costs = dict[str, dict[str, float]]

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9,
          "kib": 2**10, "mib": 2**20, "gib": 2**30}  # fmt: skip
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class BudgetAsked:
    """A budget as the command line says it."""

    kind: Kind
    limit: float
    method: Method


def budget_asked(
    *,
    avg_bits: float | None,
    max_bytes: str | None,
    max_latency_ms: float | None,
    latency_table: Path | None,
    method: Method,
) -> BudgetAsked | None:
    """The one budget the command line gives, or None.

    Raises:
        UsageError: more than one, not positive, or a latency table without its budget.
    """
    given: dict[Kind, float] = {}
    if avg_bits is not None:
        given["avg-bits"] = avg_bits
    if max_bytes is not None:
        given["max-bytes"] = parse_bytes(max_bytes)
    if max_latency_ms is not None:
        given["max-latency-ms"] = max_latency_ms
    if len(given) > 1:
        message = f"wanted one budget, got {' and '.join(f'--{name}' for name in given)}"
        raise UsageError(message)
    if latency_table is not None and max_latency_ms is None:
        raise UsageError("--latency-table is for --max-latency-ms X; give both or neither")
    for kind, limit in given.items():
        if not (math.isfinite(limit) and limit > 0):
            raise UsageError(f"--{kind} must be a positive number, got {limit:g}")
        return BudgetAsked(kind, limit, method)
    return None


def parse_bytes(text: str) -> int:
    """``6MB``, ``500 kB``, ``4MiB`` or a plain number as bytes; a megabyte is 10^6.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", text)
    factor = _UNITS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        message = f"max-bytes must be a size such as 6MB, 500kB or 4MiB, got {text!r}"
        raise UsageError(message)
    return int(float(match[1]) * factor)


def weight_width(bits: str) -> int:
    """Weight bits of ``w4a8``; 32 of ``float``."""
    return 8 * _FLOAT_BYTES if bits == FLOAT_BITS else int(parse_bits(bits)[1:].split("a")[0])


def allocate_bits(
    asked: BudgetAsked,
    layers: Sequence[LayerScores],
    graph_module: fx.GraphModule,
    latency: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[dict[str, str], Budget]:
    """The bits of each layer under a budget, and what they come to.

    Layers of one group get the same bits. ``avg-bits`` counts the bits of the scored layers'
    weights; ``max-bytes`` what all the model's tensors take in the file, where codes of 5 to 8
    bits are bytes and narrower ones half bytes; ``max-latency-ms`` the sum of a measured table,
    which must have every layer at all its bits.

    Raises:
        UsageError: the budget can't be kept, or the table lacks a layer.
    """
    fixed, costs, unit, note = 0.0, {}, "", ""
    limit = asked.limit
    if asked.kind == "avg-bits":
        count = sum(layer.weights for layer in layers)
        costs = {
            a.layer: {b: a.weights * weight_width(b) / count for b in a.scores} for a in layers
        }
        unit = "bits a weight"
    elif asked.kind == "max-bytes":
        costs = {a.layer: {b: _stored(a, b) for b in a.scores} for a in layers}
        fixed = _other_bytes(graph_module, layers)
        unit = "bytes"
        note = (
            f"of it {fixed:,.0f} bytes in tensors that keep their width; the file's graph comes "
            "on top"
        )
    else:
        assert latency is not None
        costs = _times(layers, latency)
        scored = {layer.layer for layer in layers}
        fixed = sum(row.get(FLOAT_BITS, 0.0) for name, row in latency.items() if name not in scored)
        unit = "ms"
        note = "the sum of times measured layer by layer, in models of one width throughout"
    members: dict[str, list[LayerScores]] = {}
    for layer in layers:
        members.setdefault(layer.group, []).append(layer)
    scores = {
        group: {
            bits: sum(layer.scores[bits] for layer in inside)
            for bits in inside[0].scores
            if all(bits in layer.scores for layer in inside)
        }
        for group, inside in members.items()
    }
    grouped = {
        group: {bits: sum(costs[layer.layer][bits] for layer in members[group]) for bits in row}
        for group, row in scores.items()
    }
    if fixed:  # part of what can't be lowered, so that the error names the whole
        scores["(the rest)"], grouped["(the rest)"] = {"": 0.0}, {"": fixed}
    picked = allocate(scores, grouped, limit, asked.method, unit=unit)
    budget = Budget(
        kind=asked.kind,
        limit=limit,
        spent=total(grouped, picked),
        method=asked.method,
        score=total(scores, picked),
        note=note,
    )
    return {layer.layer: picked[layer.group] for layer in layers}, budget


def _stored(layer: LayerScores, bits: str) -> float:
    """Bytes of a layer's weights in the file: codes and one float scale a channel."""
    width = weight_width(bits)
    if bits == FLOAT_BITS:
        return layer.weights * _FLOAT_BYTES
    codes = (layer.weights + 1) // 2 if width <= 4 else layer.weights
    return codes + _FLOAT_BYTES * layer.channels


def _other_bytes(graph_module: fx.GraphModule, layers: Sequence[LayerScores]) -> float:
    """Bytes of the tensors that are no scored layer's weight: biases, norms, embeddings."""
    tensors = {}
    for node in graph_module.graph.nodes:
        value = constant(graph_module, node)
        if value is not None:
            tensors[str(node.target)] = value.numel() * value.element_size()
    return sum(tensors.values()) - _FLOAT_BYTES * sum(layer.weights for layer in layers)


def _times(layers: Sequence[LayerScores], latency: Mapping[str, Mapping[str, float]]) -> Costs:
    costs: Costs = {}
    for layer in layers:
        row = latency.get(layer.layer, {})
        missing = [bits for bits in layer.scores if bits not in row]
        if missing:
            message = (
                f"the latency table has no time of {layer.layer} at {', '.join(missing)}; "
                "add it, or leave the table out to have it measured"
            )
            raise UsageError(message)
        costs[layer.layer] = {bits: row[bits] for bits in layer.scores}
    return costs
