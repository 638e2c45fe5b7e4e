"""How the quantise operators become ONNX nodes (opset 21).

Each function builds nodes through ``op``: onnxscript's opset while torch's exporter traces it, or
the builder of onnxscript's rewriter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21

__all__ = ["OPSET", "Table", "lowerings", "translation_table"]

OPSET = 21

Table = Mapping[Any, Callable[..., Any]]
"""By operator, what builds its nodes: ``op``, then the operator's own arguments."""


def _scalar(op: Any, value: float | np.generic, dtype: type[np.generic], name: str) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype), name=name))


def lower_fake_quantize(op: Any, x: Any, scale: float, zero_point: int, bits: int) -> Any:
    """QuantizeLinear and DequantizeLinear on uint8.

    Codes narrower than 8 bits are carried in uint8: clipping the input first leaves exactly the
    codes 0 .. 2**bits - 1, so an 8-bit kernel computes the narrow result.
    """
    return _quantize_dequantize(op, x, scale, zero_point, bits, np.uint8(zero_point))


def lower_fake_quantize_signed(op: Any, x: Any, scale: float, zero_point: int, bits: int) -> Any:
    """The same, but a grid around zero on int8 without a zero point: the same values."""
    if zero_point != 2 ** (bits - 1):
        return lower_fake_quantize(op, x, scale, zero_point, bits)
    return _quantize_dequantize(op, x, scale, zero_point, bits, np.int8(0))


def _quantize_dequantize(
    op: Any, x: Any, scale: float, zero_point: int, bits: int, stored_zero: np.uint8 | np.int8
) -> Any:
    if bits < 8:
        low = np.float32(scale) * np.float32(0 - zero_point)
        high = np.float32(scale) * np.float32(2**bits - 1 - zero_point)
        x = op.Clip(x, _scalar(op, low, np.float32, "low"), _scalar(op, high, np.float32, "high"))
    scale_node = _scalar(op, scale, np.float32, "scale")
    zero_node = _scalar(op, stored_zero, type(stored_zero), "zero_point")
    return op.DequantizeLinear(op.QuantizeLinear(x, scale_node, zero_node), scale_node, zero_node)


def lower_dequantize(op: Any, codes: Any, scale: Any, axis: int, bits: int) -> Any:
    """DequantizeLinear of stored codes; 4-bit codes are packed once the model is built."""
    return op.DequantizeLinear(codes, scale, axis=axis)


def lower_fake_quantize_log(
    op: Any,
    x: Any,
    shift: float,
    rate: float,
    offset: float,
    values: Sequence[float],
    step: float,
    zero_point: int,
) -> Any:
    """The code from a logarithm, then a lookup.

    ``x + shift`` <= 0 has the last code: its logarithm is minus infinity, which the clip takes.
    """
    if shift != 0:
        x = op.Add(x, _scalar(op, shift, np.float32, "shift"))
    code = op.Mul(
        op.Log(op.Relu(x)), _scalar(op, -rate / np.log(2), np.float32, "minus_rate_over_ln2")
    )
    if offset != 0:
        code = op.Add(code, _scalar(op, offset, np.float32, "offset"))
    return _lookup(op, op.Round(code), values, step, zero_point)


def lower_fake_quantize_twin(
    op: Any,
    x: Any,
    split: float,
    low_step: float,
    high_step: float,
    values: Sequence[float],
    step: float,
    zero_point: int,
) -> Any:
    """Divide by the step of the value's grid, then look the code up."""
    split_node = _scalar(op, split, np.float32, "split")
    steps = op.Where(
        op.Less(x, split_node),
        _scalar(op, low_step, np.float32, "low_step"),
        _scalar(op, high_step, np.float32, "high_step"),
    )
    code = op.Round(op.Div(op.Sub(x, split_node) if split != 0 else x, steps))
    code = op.Add(code, _scalar(op, len(values) // 2, np.float32, "half"))
    return _lookup(op, code, values, step, zero_point)


def _lookup(op: Any, code: Any, values: Sequence[float], step: float, zero_point: int) -> Any:
    """``values[clip(code, 0, len(values) - 1)]``.

    Where the values lie on an 8-bit grid the table holds uint8 and a DequantizeLinear follows it,
    which runtimes fuse into the product that reads it as into any other quantised product.
    """
    low, high = (
        _scalar(op, 0, np.float32, "first"),
        _scalar(op, len(values) - 1, np.float32, "last"),
    )
    index = op.Cast(op.Clip(code, low, high), to=ir.DataType.INT32)
    table = np.array(values, np.float32)
    if step == 0:
        return op.Gather(op.Constant(value=ir.tensor(table, name="values")), index, axis=0)
    codes = np.rint(table / np.float32(step)) + zero_point
    stored = op.Constant(value=ir.tensor(codes.astype(np.uint8), name="value_codes"))
    return op.DequantizeLinear(
        op.Gather(stored, index, axis=0),
        _scalar(op, step, np.float32, "value_step"),
        _scalar(op, zero_point, np.uint8, "value_zero_point"),
    )


def lower_group_norm(
    op: Any,
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """A plain normalisation, then the affine part.

    ONNX Runtime has no CPU kernel for GroupNormalization: it expands into a dozen operators that
    take twice as long. One group is LayerNormalization over everything but the batch, whose
    obligatory scale is made when the file is loaded; more are InstanceNormalization with each
    group as a channel.
    """
    shape = [int(size) for size in x.shape[1:]]
    if num_groups == 1:
        one = ir.tensor(np.ones(1, np.float32), name="one")
        result, *_ = op.LayerNormalization(
            x, op.ConstantOfShape(_shape(op, shape), value=one), axis=1, epsilon=eps
        )
    else:
        ones = op.Constant(value=ir.tensor(np.ones(num_groups, np.float32), name="ones"))
        zeros = op.Constant(value=ir.tensor(np.zeros(num_groups, np.float32), name="zeros"))
        grouped = op.Reshape(x, _shape(op, [0, num_groups, -1]))
        result = op.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        result = op.Reshape(result, _shape(op, [0, *shape]))
    axes = _shape(op, list(range(1, len(shape))))
    if weight is not None:
        result = op.Mul(result, op.Unsqueeze(weight, axes) if len(shape) > 1 else weight)
    if bias is not None:
        result = op.Add(result, op.Unsqueeze(bias, axes) if len(shape) > 1 else bias)
    return result


def lower_stable_sort(
    op: Any, x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    """TopK of all: among equal values the lower index comes first, as in a stable sort."""
    count = _shape(op, [int(x.shape[dim])])
    return op.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


def _shape(op: Any, sizes: list[int]) -> Any:
    return op.Constant(value=ir.tensor(np.array(sizes, np.int64), name="shape"))


def lowerings(*, signed: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The operators that need one of these, and which.

    Args:
        signed: grids around zero become int8 without a zero point.
    """
    ops = torch.ops.deploykit
    return {
        ops.fake_quantize.default: lower_fake_quantize_signed if signed else lower_fake_quantize,
        ops.dequantize.default: lower_dequantize,
        ops.fake_quantize_log.default: lower_fake_quantize_log,
        ops.fake_quantize_twin.default: lower_fake_quantize_twin,
        torch.ops.aten.group_norm.default: lower_group_norm,
        torch.ops.aten.sort.stable: lower_stable_sort,
    }


def translation_table(table: Table) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Lowerings for ``torch.onnx.export(custom_translation_table=…)``.

    The exporter reads signatures and knows ``op`` of none.
    """
    return {target: _traced(lower) for target, lower in table.items()}


def _traced(lower: Callable[..., Any]) -> Callable[..., Any]:
    def translate(*args: Any, **kwargs: Any) -> Any:
        return lower(opset21, *args, **kwargs)

    own = inspect.signature(lower)
    translate.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=list(own.parameters.values())[1:]
    )
    translate.__annotations__ = {k: v for k, v in lower.__annotations__.items() if k != "op"}
    translate.__name__ = lower.__name__
    return translate
