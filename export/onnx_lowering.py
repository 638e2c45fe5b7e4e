"""How the quantise operators become ONNX nodes (opset 21)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

__all__ = ["OPSET", "translation_table"]

OPSET = 21


def _scalar(value: float | np.generic, dtype: type[np.generic], name: str) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype), name=name))


def lower_fake_quantize(x: Any, scale: float, zero_point: int, bits: int) -> Any:
    """QuantizeLinear and DequantizeLinear on uint8.

    Codes narrower than 8 bits are carried in uint8: clipping the input first leaves exactly the
    codes 0 .. 2**bits - 1, so an 8-bit kernel computes the narrow result.
    """
    return _quantize_dequantize(x, scale, zero_point, bits, np.uint8(zero_point))


def lower_fake_quantize_signed(x: Any, scale: float, zero_point: int, bits: int) -> Any:
    """The same, but a grid around zero on int8 without a zero point: the same values."""
    if zero_point != 2 ** (bits - 1):
        return lower_fake_quantize(x, scale, zero_point, bits)
    return _quantize_dequantize(x, scale, zero_point, bits, np.int8(0))


def _quantize_dequantize(
    x: Any, scale: float, zero_point: int, bits: int, stored_zero: np.uint8 | np.int8
) -> Any:
    if bits < 8:
        low = np.float32(scale) * np.float32(0 - zero_point)
        high = np.float32(scale) * np.float32(2**bits - 1 - zero_point)
        x = op.Clip(x, _scalar(low, np.float32, "low"), _scalar(high, np.float32, "high"))
    scale_node = _scalar(scale, np.float32, "scale")
    zero_node = _scalar(stored_zero, type(stored_zero), "zero_point")
    return op.DequantizeLinear(op.QuantizeLinear(x, scale_node, zero_node), scale_node, zero_node)


def lower_dequantize(codes: Any, scale: Any, axis: int, bits: int) -> Any:
    """DequantizeLinear of stored codes; 4-bit codes are packed once the model is built."""
    return op.DequantizeLinear(codes, scale, axis=axis)


def lower_fake_quantize_log(
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
        x = op.Add(x, _scalar(shift, np.float32, "shift"))
    code = op.Mul(op.Log(op.Relu(x)), _scalar(-rate / np.log(2), np.float32, "minus_rate_over_ln2"))
    if offset != 0:
        code = op.Add(code, _scalar(offset, np.float32, "offset"))
    return _lookup(op.Round(code), values, step, zero_point)


def lower_fake_quantize_twin(
    x: Any,
    split: float,
    low_step: float,
    high_step: float,
    values: Sequence[float],
    step: float,
    zero_point: int,
) -> Any:
    """Divide by the step of the value's grid, then look the code up."""
    split_node = _scalar(split, np.float32, "split")
    steps = op.Where(
        op.Less(x, split_node),
        _scalar(low_step, np.float32, "low_step"),
        _scalar(high_step, np.float32, "high_step"),
    )
    code = op.Round(op.Div(op.Sub(x, split_node) if split != 0 else x, steps))
    code = op.Add(code, _scalar(len(values) // 2, np.float32, "half"))
    return _lookup(code, values, step, zero_point)


def _lookup(code: Any, values: Sequence[float], step: float, zero_point: int) -> Any:
    """``values[clip(code, 0, len(values) - 1)]``.

    Where the values lie on an 8-bit grid the table holds uint8 and a DequantizeLinear follows it,
    which runtimes fuse into the product that reads it as into any other quantised product.
    """
    low, high = _scalar(0, np.float32, "first"), _scalar(len(values) - 1, np.float32, "last")
    index = op.Cast(op.Clip(code, low, high), to=ir.DataType.INT32)
    table = np.array(values, np.float32)
    if step == 0:
        return op.Gather(op.Constant(value=ir.tensor(table, name="values")), index, axis=0)
    codes = np.rint(table / np.float32(step)) + zero_point
    stored = op.Constant(value=ir.tensor(codes.astype(np.uint8), name="value_codes"))
    return op.DequantizeLinear(
        op.Gather(stored, index, axis=0),
        _scalar(step, np.float32, "value_step"),
        _scalar(zero_point, np.uint8, "value_zero_point"),
    )


def lower_group_norm(
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
            x, op.ConstantOfShape(_shape(shape), value=one), axis=1, epsilon=eps
        )
    else:
        ones = op.Constant(value=ir.tensor(np.ones(num_groups, np.float32), name="ones"))
        zeros = op.Constant(value=ir.tensor(np.zeros(num_groups, np.float32), name="zeros"))
        grouped = op.Reshape(x, _shape([0, num_groups, -1]))
        result = op.InstanceNormalization(grouped, ones, zeros, epsilon=eps)
        result = op.Reshape(result, _shape([0, *shape]))
    axes = _shape(list(range(1, len(shape))))
    if weight is not None:
        result = op.Mul(result, op.Unsqueeze(weight, axes) if len(shape) > 1 else weight)
    if bias is not None:
        result = op.Add(result, op.Unsqueeze(bias, axes) if len(shape) > 1 else bias)
    return result


def _shape(sizes: list[int]) -> Any:
    return op.Constant(value=ir.tensor(np.array(sizes, np.int64), name="shape"))


def translation_table(*, signed: bool) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=…)``.

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
    }
