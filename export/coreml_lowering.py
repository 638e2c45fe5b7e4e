"""How the quantise operators become MIL operators, and which stay in float32."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813  its name everywhere
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.mil import types
from numpy.typing import NDArray

__all__ = ["Lowering", "fits_half"]

# A scale that is this much off adds noise 54 dB below the signal, well under that of 8-bit codes.
_SCALE_ERROR = 2.0**-9


def fits_half(scale: NDArray[np.floating[Any]] | float, used: Any = True) -> bool:
    """Whether float16 holds the scales well enough.

    Args:
        scale: any shape, positive.
        used: broadcastable to ``scale``: False where all codes are zero and no scale matters.
    """
    wanted = np.asarray(scale, np.float64)
    with np.errstate(over="ignore"):
        error = np.abs(wanted.astype(np.float16).astype(np.float64) - wanted)
    return bool(np.all((error <= _SCALE_ERROR * wanted) | ~np.broadcast_to(used, wanted.shape)))


class Lowering:
    """The translation of one graph.

    Args:
        blockwise: the target is iOS 18 or later, which has 4-bit codes.
    """

    def __init__(self, *, blockwise: bool) -> None:
        self._blockwise = blockwise
        self._exact: set[str] = set()

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """Make coremltools know our operators for a while.

        It lacks ``alias``, too, and its own ``group_norm`` fails on a dynamic batch.
        """
        table = _TORCH_OPS_REGISTRY.name_to_func_mapping
        ours: dict[str, Callable[[Any, Any], None]] = {
            "deploykit::fake_quantize": self._fake_quantize,
            "deploykit::dequantize": self._dequantize,
            "deploykit::fake_quantize_log": self._fake_quantize_log,
            "deploykit::fake_quantize_twin": self._fake_quantize_twin,
            "group_norm": _group_norm,
        }
        if "alias" not in table:
            ours["alias"] = _identity
        before = dict(table)
        table.update(ours)
        try:
            yield
        finally:
            table.clear()
            table.update(before)

    def may_be_half(self, op: Any) -> bool:
        """Whether a MIL operator is computed in float16; asked once for each by coremltools."""
        exact = op.name in self._exact
        compressed = [var for var in _vars(op) if _is_constexpr(var.op)]
        poor = _has_poor_scale(op) or any(_has_poor_scale(var.op) for var in compressed)
        return not (exact or poor)

    def _dequantize(self, context: Any, node: Any) -> None:
        """Codes of a weight stay codes; a bias becomes floats: Core ML has no integer biases."""
        codes, scale, axis, bits = (var.val for var in _get_inputs(context, node, expected=4))
        shape = [1] * codes.ndim
        shape[int(axis)] = -1
        if bits > 8:
            value = codes.astype(np.float64) * scale.reshape(shape)
            context.add(mb.const(val=value.astype(np.float32), name=node.name))
            return
        name = node.inputs[0].removeprefix("b_").removesuffix("_codes")
        if self._blockwise:
            kind = types.np_int4_dtype if bits <= 4 else np.int8
            weight = mb.constexpr_blockwise_shift_scale(
                data=codes.astype(kind), scale=scale.reshape(shape), name=name
            )
        else:
            weight = mb.constexpr_affine_dequantize(
                quantized_data=codes.astype(np.int8),
                zero_point=np.int8(0),
                scale=scale,
                axis=np.int32(axis),
                name=name,
            )
        context.add(weight, torch_name=node.name)

    def _fake_quantize(self, context: Any, node: Any) -> None:
        """``quantize`` and ``dequantize`` on uint8; narrower codes by clipping the input."""
        x, scale_var, zero_var, bits = _get_inputs(context, node, expected=4)
        scale, zero_point = np.float32(scale_var.val), int(zero_var.val)
        if bits.val < 8:
            x = mb.clip(
                x=x,
                alpha=scale * np.float32(0 - zero_point),
                beta=scale * np.float32(2**bits.val - 1 - zero_point),
                name=f"{node.name}_clip",
            )
        grid = {"scale": scale, "zero_point": np.uint8(zero_point)}
        codes = mb.quantize(input=x, output_dtype="uint8", name=f"{node.name}_codes", **grid)
        context.add(mb.dequantize(input=codes, name=node.name, **grid))

    def _fake_quantize_log(self, context: Any, node: Any) -> None:
        """The code from a logarithm, then a lookup.

        ``x + shift`` <= 0 has the last code: its logarithm is minus infinity (or that of the
        least float), which the clip takes.
        """
        x, *settings = _get_inputs(context, node, expected=7)
        shift, rate, offset, values, step, zero_point = (_value(item) for item in settings)
        name = node.name
        if shift != 0:
            x = mb.add(x=x, y=np.float32(shift), name=self._keep(f"{name}_shifted"))
        x = mb.relu(x=x, name=self._keep(f"{name}_relu"))
        x = mb.log(x=x, name=self._keep(f"{name}_log"))
        code = mb.mul(x=x, y=np.float32(-rate / np.log(2)), name=self._keep(f"{name}_rate"))
        if offset != 0:
            code = mb.add(x=code, y=np.float32(offset), name=self._keep(f"{name}_offset"))
        context.add(self._lookup(code, values, step, zero_point, name))

    def _fake_quantize_twin(self, context: Any, node: Any) -> None:
        """Divide by the step of the value's grid, then look the code up."""
        x, *settings = _get_inputs(context, node, expected=7)
        split, low, high, values, step, zero_point = (_value(item) for item in settings)
        name = node.name
        below = mb.less(x=x, y=np.float32(split), name=self._keep(f"{name}_below"))
        # A division by a constant would become a product, which rounds otherwise at ties.
        one = [1] * x.rank
        steps = mb.select(
            cond=below,
            a=np.full(one, low, np.float32),
            b=np.full(one, high, np.float32),
            name=self._keep(f"{name}_step"),
        )
        if split != 0:
            x = mb.sub(x=x, y=np.float32(split), name=self._keep(f"{name}_moved"))
        code = mb.real_div(x=x, y=steps, name=self._keep(f"{name}_steps"))
        code = mb.round(x=code, name=self._keep(f"{name}_nearest"))
        half = np.float32(len(values) // 2)
        code = mb.add(x=code, y=half, name=self._keep(f"{name}_half"))
        context.add(self._lookup(code, values, step, zero_point, name))

    def _lookup(
        self, code: Any, values: Sequence[float], step: float, zero_point: int, name: str
    ) -> Any:
        """``values[clip(round(code), 0, len(values) - 1)]``.

        Where the values lie on an 8-bit grid the table holds uint8 and a ``dequantize`` follows
        it, as after any other quantiser.
        """
        last = np.float32(len(values) - 1)
        code = mb.round(x=code, name=self._keep(f"{name}_round"))
        code = mb.clip(x=code, alpha=np.float32(0), beta=last, name=self._keep(f"{name}_clip"))
        index = mb.cast(x=code, dtype="int32", name=f"{name}_index")
        table = np.array(values, np.float32)
        if step == 0:
            return mb.gather(x=table, indices=index, axis=0, name=name)
        stored = (np.rint(table / np.float32(step)) + zero_point).astype(np.uint8)
        return mb.dequantize(
            input=mb.gather(x=stored, indices=index, axis=0, name=f"{name}_codes"),
            scale=np.float32(step),
            zero_point=np.uint8(zero_point),
            name=name,
        )

    def _keep(self, name: str) -> str:
        """Note that the operator of this name is computed in float32, or the code would differ."""
        self._exact.add(name)
        return name


def _identity(context: Any, node: Any) -> None:
    context.add(mb.identity(x=_get_inputs(context, node, expected=1)[0], name=node.name))


def _group_norm(context: Any, node: Any) -> None:
    """A plain ``layer_norm`` over each group, then the affine part."""
    x, groups, weight, bias, epsilon, *_ = _get_inputs(context, node, min_expected=5)
    shape = [int(size) for size in x.shape[1:]]  # only the batch may be unknown
    if groups.val > 1:
        x = mb.reshape(x=x, shape=[-1, int(groups.val), int(np.prod(shape)) // int(groups.val)])
    axes = list(range(2 if groups.val > 1 else 1, x.rank))
    x = mb.layer_norm(x=x, axes=axes, epsilon=np.float32(epsilon.val))
    if groups.val > 1:
        x = mb.reshape(x=x, shape=[-1, *shape])
    wide = [-1] + [1] * (len(shape) - 1)
    if weight is not None:
        x = mb.mul(x=x, y=weight.val.reshape(wide))
    if bias is not None:
        x = mb.add(x=x, y=bias.val.reshape(wide))
    context.add(x, torch_name=node.name)


def _value(item: Any) -> Any:
    """A constant argument; a list of numbers comes as a list of variables or as one."""
    if isinstance(item, list | tuple):
        return [float(part.val) for part in item]
    return item.val


def _vars(op: Any) -> list[Any]:
    """The variables an operator reads."""
    found = []
    for value in op.inputs.values():
        found += list(value) if isinstance(value, list | tuple) else [value]
    return [var for var in found if var is not None]


def _is_constexpr(op: Any) -> bool:
    return op is not None and op.op_type.startswith("constexpr_")


def _has_poor_scale(op: Any) -> bool:
    """Whether the scale of a (de)quantising operator would be lost in float16."""
    if op is None:
        return False
    if op.op_type in ("quantize", "dequantize"):
        return not fits_half(op.scale.val)
    if op.op_type == "constexpr_blockwise_shift_scale":
        scale = op.scale.val
        others = tuple(axis for axis in range(scale.ndim) if scale.shape[axis] == 1)
        used = np.any(op.data.val != 0, axis=others, keepdims=True)
        return not fits_half(scale, np.broadcast_to(used, scale.shape))
    if op.op_type == "constexpr_affine_dequantize":
        codes = op.quantized_data.val
        others = tuple(axis for axis in range(codes.ndim) if axis != op.axis.val)
        return not fits_half(op.scale.val, np.any(codes != 0, axis=others))
    return False
