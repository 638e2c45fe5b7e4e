"""What older exporters took apart, put together again: layers that passes know by name.

Each function looks for one pattern and makes one node of it. Nodes that lose their only reader
go afterwards; a value with other readers stays, so a match is right whoever else reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from deploykit.onnx_import.graph import Array, Graph, Node

__all__ = ["fuse"]


def fuse(graph: Graph) -> None:
    """Recognise, in place: LayerNorm, GELU, GroupNorm, SiLU and hard swish, linear with bias."""
    for find in (_layer_norms, _gelus, _gates, _group_norms, _linear_biases):
        view = _View(graph)
        for last, made in find(view):
            if any(node is last for node in graph.nodes):
                graph.nodes = [made if node is last else node for node in graph.nodes]
        graph.drop_dead()


class _View:
    """A graph seen from its values."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.maker = {name: node for node in graph.nodes for name in node.outputs}
        self.users = graph.users()

    def nodes(self, *ops: str) -> Iterator[Node]:
        return (node for node in self.graph.nodes if node.op in ops)

    def made_by(self, name: str, *ops: str) -> Node | None:
        node = self.maker.get(name)
        return node if node is not None and node.op in ops else None

    def readers(self, name: str, *ops: str) -> list[Node]:
        return [node for node in self.users.get(name, []) if node.op in ops]

    def constant(self, name: str) -> Array | None:
        return self.graph.constants.get(name)

    def number(self, name: str) -> float | None:
        value = self.constant(name)
        return float(value.reshape(())) if value is not None and value.size == 1 else None

    def beside(self, node: Node, name: str) -> str | None:
        """The other of a node's two inputs."""
        if len(node.inputs) != 2 or name not in node.inputs:
            return None
        return node.inputs[1] if node.inputs[0] == name else node.inputs[0]

    def affine(self, name: str, op: str) -> tuple[Node, str] | None:
        """The only reader of a value, if it is ``op`` with a constant; and the constant's name."""
        if len(self.users.get(name, [])) != 1 or name == self.graph.output:
            return None
        for node in self.readers(name, op):
            other = self.beside(node, name)
            if other is not None and self.constant(other) is not None:
                return node, other
        return None

    def store(self, name: str, value: Array) -> str:
        """A constant in another shape, under a name of its own."""
        stored = f"{name}/{'x'.join(map(str, value.shape))}"
        self.graph.constants[stored] = value
        if name in self.graph.parameters:
            self.graph.parameters.add(stored)
        return stored


_Found = Iterator[tuple[Node, Node]]


def _gelus(view: _View) -> _Found:
    """``x / 2 * (1 + erf(x / sqrt 2))``, its factors in any order."""
    for erf in view.nodes("Erf"):
        scaled = view.made_by(erf.inputs[0], "Div", "Mul")
        if scaled is None:
            continue
        divisor = view.number(scaled.inputs[1])
        if divisor is None or not math.isclose(
            divisor, math.sqrt(2) ** (1 if scaled.op == "Div" else -1), rel_tol=1e-5
        ):
            continue
        x = scaled.inputs[0]
        for add in view.readers(erf.outputs[0], "Add"):
            if view.number(view.beside(add, erf.outputs[0]) or "") != 1:
                continue
            first = view.readers(add.outputs[0], "Mul")
            for last in [*first, *(m for f in first for m in view.readers(f.outputs[0], "Mul"))]:
                leaves = _factors(view, last, x, depth=2)
                numbers = [view.number(leaf) for leaf in leaves]
                rest = [leaf for leaf, n in zip(leaves, numbers, strict=True) if n is None]
                half = math.prod(n for n in numbers if n is not None)
                if half == 0.5 and sorted(rest) == sorted([x, add.outputs[0]]):
                    yield last, _like(last, "Gelu", (x,))


def _factors(view: _View, node: Node, stop: str, depth: int) -> list[str]:
    leaves = []
    for name in node.inputs:
        inner = view.made_by(name, "Mul")
        if inner is None or name == stop or depth == 0:
            leaves.append(name)
        else:
            leaves += _factors(view, inner, stop, depth - 1)
    return leaves


def _layer_norms(view: _View) -> _Found:
    """``(x - mean) / sqrt(mean((x - mean)^2) + eps) * w + b`` over the last dimension."""
    for root in view.nodes("Sqrt"):
        shifted = view.made_by(root.inputs[0], "Add")
        epsilon = None if shifted is None else view.number(shifted.inputs[1])
        if shifted is None or epsilon is None:
            continue
        variance = view.made_by(shifted.inputs[0], "ReduceMean")
        centred = None if variance is None else _squared(view, variance.inputs[0])
        if variance is None or centred is None or not _last_axis(view, variance):
            continue
        mean = view.made_by(centred.inputs[1], "ReduceMean")
        x = centred.inputs[0]
        if mean is None or mean.inputs[0] != x or not _last_axis(view, mean):
            continue
        for quotient in view.readers(root.outputs[0], "Div"):
            above = view.made_by(quotient.inputs[0], "Sub")
            if above is None or above.inputs != centred.inputs:
                continue
            yield from _with_affine(view, quotient, x, epsilon)


def _with_affine(view: _View, quotient: Node, x: str, epsilon: float) -> _Found:
    scale = view.affine(quotient.outputs[0], "Mul")
    if scale is None or (view.constant(scale[1]) is None):
        return
    last, inputs = scale[0], [x, scale[1]]
    shift = view.affine(last.outputs[0], "Add")
    given = [view.constant(name) for name in (scale[1], shift[1] if shift else scale[1])]
    shapes = [() if value is None else value.shape for value in given]
    if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        return
    if shift is not None:
        last, inputs = shift[0], [*inputs, shift[1]]
    yield last, _like(last, "LayerNormalization", tuple(inputs), axis=-1, epsilon=epsilon)


def _squared(view: _View, name: str) -> Node | None:
    """The Sub whose square a value is."""
    power = view.made_by(name, "Pow", "Mul")
    if power is None:
        return None
    twice = power.inputs[0] == power.inputs[1]
    if not (twice if power.op == "Mul" else view.number(power.inputs[1]) == 2):
        return None
    return view.made_by(power.inputs[0], "Sub")


def _last_axis(view: _View, mean: Node) -> bool:
    given = view.constant(mean.inputs[1]) if len(mean.inputs) > 1 else mean.get("axes")
    return given is not None and list(given) == [-1] and bool(mean.get("keepdims", 1))


def _group_norms(view: _View) -> _Found:
    """A plain normalisation of groups of channels, then a scale and a shift for each channel."""
    for norm in view.nodes("InstanceNormalization", "LayerNormalization"):
        plain = [view.constant(name) for name in norm.inputs[1:] if name]
        if plain[0] is None or not np.all(plain[0] == 1):
            continue
        if len(plain) > 1 and (plain[1] is None or np.any(plain[1] != 0)):
            continue
        found = _grouped(view, norm)
        if found is None:
            continue
        x, groups, whole = found
        scale = view.affine(whole, "Mul")
        shift = None if scale is None else view.affine(scale[0].outputs[0], "Add")
        if scale is None or shift is None:
            continue
        weight, bias = (_per_channel(view.constant(name)) for name in (scale[1], shift[1]))
        if weight is None or bias is None or weight.shape != bias.shape or weight.size % groups:
            continue
        names = [view.store(scale[1], weight), view.store(shift[1], bias)]
        attributes = {"num_groups": groups, "epsilon": norm.get("epsilon", 1e-5)}
        made = _like(shift[0], "GroupNormalization", (x, *names), **attributes)
        yield shift[0], Node(made.op, made.name, made.inputs, made.outputs, made.attributes, 21)


def _grouped(view: _View, norm: Node) -> tuple[str, int, str] | None:
    """What is normalised, in how many groups, and the result in the same shape."""
    if norm.op == "LayerNormalization":
        ones = view.constant(norm.inputs[1])
        one = norm.get("axis", -1) == 1 and ones is not None and ones.ndim in (1, 3)
        return (norm.inputs[0], 1, norm.outputs[0]) if one else None
    before = view.made_by(norm.inputs[0], "Reshape")
    shape = None if before is None else view.constant(before.inputs[1])
    after = view.readers(norm.outputs[0], "Reshape")
    if before is None or shape is None or len(after) != 1:
        return None
    if len(shape) != 3 or shape[0] not in (0, 1) or shape[2] != -1 or shape[1] < 1:
        return None
    back = view.made_by(after[0].inputs[1], "Shape")
    same = (
        back is not None
        and back.inputs[0] == before.inputs[0]
        and not back.get("start", 0)
        and "end" not in back.attributes
    )
    given = view.constant(after[0].inputs[1])
    if not same and (given is None or len(given) != 4):
        return None
    return before.inputs[0], int(shape[1]), after[0].outputs[0]


def _per_channel(value: Array | None) -> Array | None:
    """(C, 1, 1) or (1, C, 1, 1) as (C,)."""
    if value is None or value.ndim not in (3, 4) or value.shape[-2:] != (1, 1):
        return None
    return value.reshape(-1) if value.size == value.shape[-3] else None


def _gates(view: _View) -> _Found:
    """``x * sigmoid(x)`` and ``x * hard_sigmoid(x)``."""
    for gate in view.nodes("Sigmoid", "HardSigmoid"):
        x, out = gate.inputs[0], gate.outputs[0]
        usual = abs(gate.get("alpha", 0.2) - 1 / 6) < 1e-6 and gate.get("beta", 0.5) == 0.5
        if gate.op == "HardSigmoid" and not usual:
            continue
        for product in view.readers(out, "Mul"):
            if view.beside(product, out) == x:
                yield product, _like(product, "Silu" if gate.op == "Sigmoid" else "HardSwish", (x,))


def _linear_biases(view: _View) -> _Found:
    """A product with a constant matrix, then a constant vector."""
    for product in view.nodes("MatMul"):
        weight = view.constant(product.inputs[1])
        shift = view.affine(product.outputs[0], "Add")
        if weight is None or weight.ndim != 2 or shift is None:
            continue
        bias = view.constant(shift[1])
        if bias is not None and bias.shape == (weight.shape[1],):
            inputs = (*product.inputs, shift[1])
            yield (
                shift[0],
                Node("MatMul", product.name, inputs, shift[0].outputs, {}, product.opset),
            )


def _like(last: Node, op: str, inputs: tuple[str, ...], **attributes: Any) -> Node:
    return Node(op, last.name, inputs, last.outputs, attributes, last.opset)
