"""What an operator may do to merged tokens, and its arguments with the new number of tokens.

Every operator that reads merged tokens has a rule here, or the merge is declined: an operator
that mixes tokens by their place, or has their number built in where it can't be changed, would
silently compute something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from deploykit.prune.tokens_errors import BlockedError

__all__ = ["Tokens", "changed_axes", "op_packet", "pass_through"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Tokens:
    """What a value's token axis holds.

    Attributes:
        before: its length in the original graph.
        after: its length now.
        first: which token of the stream comes first on it (0 but behind a slice).
        sizes: (B, stream, 1), how many original tokens are in each token of the stream.
        log_sizes: (B, 1, stream), their logarithm.
    """

    before: int
    after: int
    first: int
    sizes: fx.Node
    log_sizes: fx.Node | None


_ELEMENTWISE = frozenset((
    "abs", "add", "alias", "bitwise_and", "bitwise_not", "clamp", "clamp_max", "clamp_min",
    "clone", "contiguous", "cos", "detach", "div", "elu", "eq", "erf", "exp", "fmod", "ge",
    "gelu", "gt", "hardsigmoid", "hardswish", "hardtanh", "le", "leaky_relu", "log",
    "logical_and", "logical_not", "logical_or", "lt", "masked_fill", "maximum", "minimum",
    "mish", "mul", "ne", "neg", "pow", "prelu", "reciprocal", "relu", "relu6", "rsqrt", "rsub",
    "sigmoid", "sign", "silu", "sin", "softplus", "sqrt", "square", "sub", "tanh", "to",
    "_to_copy", "type_as", "where", "ones_like", "zeros_like",
))  # fmt: skip
_MOVES = frozenset((
    "t", "mT", "permute", "transpose", "swapaxes", "swapdims", "movedim", "unsqueeze",
    "squeeze", "stack", "getitem", "sym_size",
))  # fmt: skip
_RESHAPES = frozenset(["reshape", "view", "_unsafe_view", "flatten", "unflatten"])
_REDUCTIONS = frozenset((
    "sum", "mean", "amax", "amin", "linalg_vector_norm", "norm", "argmax", "max", "min", "prod",
    "var",
))  # fmt: skip
_PARTS = frozenset(["chunk", "split", "split_with_sizes", "unbind", "select", "narrow", "cat"])
_SOFTMAX = frozenset({"softmax", "_softmax"})


def op_packet(node: fx.Node) -> str:
    """An operator's name without overload: ``add`` of ``aten.add.Tensor``."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return str(getattr(node.target, "__name__", node.target))


def changed_axes(old: Any, new: Any) -> tuple[int, ...]:
    """Axes on which a value's shape differs now; those of the first part of a list."""
    if isinstance(old, list | tuple) and old:
        return changed_axes(old[0], new[0])
    if not isinstance(old, Tensor) or old.ndim != new.ndim:
        return ()
    return tuple(axis for axis in range(old.ndim) if old.shape[axis] != new.shape[axis])


@dataclass(frozen=True)
class _Call:
    """A node that reads merged tokens."""

    node: fx.Node
    packet: str
    tokens: Tokens
    old: Mapping[fx.Node, Any]
    new: Mapping[fx.Node, Any]
    protected: int

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        if len(self.node.args) > index:
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def axes(self, index: int = 0) -> tuple[int, ...]:
        """Token axes of the argument at ``index``."""
        node = self.node.args[index]
        return changed_axes(self.old[node], self.new[node]) if isinstance(node, fx.Node) else ()

    def dims(self, dims: Any) -> set[int]:
        """Axes of the first argument, counted from the front."""
        ndim = self.old[self.node.args[0]].ndim  # type: ignore[index]
        if dims is None or dims == []:
            return set(range(ndim))
        return {dim % ndim for dim in ([dims] if isinstance(dims, int) else dims)}


def pass_through(
    node: fx.Node,
    tokens: Tokens,
    old: Mapping[fx.Node, Any],
    new: Mapping[fx.Node, Any],
    protected: int,
    attention: bool,
) -> Tokens:
    """Change a node's arguments to the new number of tokens.

    Args:
        tokens: what its inputs' token axes hold.
        old, new: the shapes of all values, in the original graph and now; the node's own new one
            is not made yet.
        protected: how many tokens in front are where they were.
        attention: it is the softmax of an attention whose logits know the sizes, or its product
            with the values.

    Returns:
        What its own token axis holds.

    Raises:
        BlockedError: it can't take merged tokens; the reason.
    """
    packet = op_packet(node)
    call = _Call(node, packet, tokens, old, new, protected)
    if packet in _ELEMENTWISE or packet in _MOVES or attention:
        return tokens
    for names, rule in _RULES.items():
        if packet in names:
            return rule(call)
    raise BlockedError(f"{node.target} at {node.name} isn't known to treat tokens one by one")


def _reshape(call: _Call) -> Tokens:
    """Axes before a token axis have the same product after the reshape: that finds it again."""
    source, shape = call.node.args[0], call.arg(1, "shape")
    assert isinstance(source, fx.Node)
    old_in, old_out = call.old[source].shape, call.old[call.node].shape
    sizes = list(shape) if call.packet not in ("flatten", "unflatten") else None
    for axis in call.axes():
        before = prod(old_in[:axis])
        found = [
            place
            for place in range(len(old_out))
            if prod(old_out[:place]) == before and old_out[place] == old_in[axis]
        ]
        if not found:
            text = f"a reshape to {list(old_out[1:])} at {call.node.name}"
            raise BlockedError(f"{text} lays {old_in[axis]} tokens out anew")
        if sizes is not None and isinstance(sizes[found[0]], int) and sizes[found[0]] != -1:
            sizes[found[0]] = call.tokens.after
    if sizes is not None:
        call.node.update_arg(1, sizes)
    return call.tokens


def _expand(call: _Call) -> Tokens:
    source = call.node.args[0]
    sizes = list(call.arg(1, "size"))
    added = len(sizes) - call.old[source].ndim  # type: ignore[index]
    for axis in call.axes():
        if isinstance(sizes[axis + added], int) and sizes[axis + added] != -1:
            sizes[axis + added] = call.tokens.after
    call.node.update_arg(1, sizes)
    return call.tokens


def _slice(call: _Call) -> Tokens:
    (axis,) = call.dims(call.arg(1, "dim", 0))
    if axis not in call.axes():
        return call.tokens
    start, end, step = call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1)
    length = call.tokens.before
    start = 0 if start is None else start
    end = length if end is None else end
    if not all(isinstance(value, int) for value in (start, end, step)):
        raise BlockedError(f"a slice whose ends are computed, at {call.node.name}")
    start = max(start + length, 0) if start < 0 else start
    end = max(end + length, 0) if end < 0 else min(end, length)
    fixed = call.protected - call.tokens.first
    if step != 1 or start > fixed or (end != length and end > fixed):
        raise BlockedError(f"tokens {start} to {end} of {length} are picked at {call.node.name}")
    whole = end == length
    call.node.args = (*call.node.args[:1], axis, start, call.tokens.after if whole else end)
    call.node.kwargs = {}
    if not whole:
        return call.tokens
    return replace(
        call.tokens,
        before=length - start,
        after=call.tokens.after - start,
        first=call.tokens.first + start,
    )


def _part(call: _Call) -> Tokens:
    """Parts of another axis; of the token axis only a protected token by itself."""
    if call.packet == "cat":
        parts = call.node.args[0]
        assert isinstance(parts, list | tuple)
        (axis,) = (call.arg(1, "dim", 0) % call.old[call.node].ndim,)
        merged = [p for p in parts if isinstance(p, fx.Node)]
        if any(axis in changed_axes(call.old[p], call.new[p]) for p in merged):
            raise BlockedError(f"further tokens are added at {call.node.name}")
        return call.tokens
    place = {"chunk": 2, "split": 2, "split_with_sizes": 2}.get(call.packet, 1)
    (axis,) = call.dims(call.arg(place, "dim", 0))
    if axis not in call.axes():
        return call.tokens
    if call.packet != "select":
        raise BlockedError(f"the tokens are split at {call.node.name}")
    index = call.arg(2, "index")
    length = call.tokens.before
    index = index + length if isinstance(index, int) and index < 0 else index
    if not isinstance(index, int) or index + call.tokens.first >= call.protected:
        raise BlockedError(f"token {index} is picked at {call.node.name} and may be merged")
    call.node.update_arg(2, index)
    return call.tokens


def _linear(call: _Call) -> Tokens:
    if call.old[call.node.args[0]].ndim - 1 in call.axes():  # type: ignore[index]
        raise BlockedError(f"a linear layer mixes tokens at {call.node.name}")
    return call.tokens


def _matmul(call: _Call) -> Tokens:
    left, right = call.node.args[:2]
    last = call.old[left].ndim - 1  # type: ignore[index]
    second = max(call.old[right].ndim - 2, 0)  # type: ignore[index]
    if last in call.axes(0) or second in call.axes(1):
        message = f"a product sums over tokens at {call.node.name}, which is no softmax attention"
        raise BlockedError(message)
    return call.tokens


def _norm(call: _Call) -> Tokens:
    ndim = call.old[call.node.args[0]].ndim  # type: ignore[index]
    if set(range(ndim - len(call.arg(1, "normalized_shape")), ndim)) & set(call.axes()):
        raise BlockedError(f"a norm over tokens at {call.node.name}")
    return call.tokens


def _over_dims(call: _Call) -> Tokens:
    place = 2 if call.packet in ("linalg_vector_norm", "norm") else 1
    if call.dims(call.arg(place, "dim")) & set(call.axes()):
        raise BlockedError(f"{call.packet} over tokens at {call.node.name}")
    return call.tokens


_RULES: dict[frozenset[str], Callable[[_Call], Tokens]] = {
    _RESHAPES: _reshape,
    frozenset({"expand"}): _expand,
    frozenset({"slice"}): _slice,
    _PARTS: _part,
    frozenset({"linear"}): _linear,
    frozenset({"matmul", "bmm"}): _matmul,
    frozenset({"layer_norm", "rms_norm"}): _norm,
    _REDUCTIONS | _SOFTMAX: _over_dims,
}
