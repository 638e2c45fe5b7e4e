"""How the quantise operators become ONNX nodes (opset 21)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

__all__ = ["OPSET", "translation_table"]

OPSET = 21


def _scalar(value: float, dtype: type[np.generic], name: str) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype), name=name))


def lower_fake_quantize(x: Any, scale: float, zero_point: int, bits: int) -> Any:
    """QuantizeLinear and DequantizeLinear on uint8.

    Codes narrower than 8 bits are carried in uint8: clipping the input first leaves exactly the
    codes 0 .. 2**bits - 1, so an 8-bit kernel computes the narrow result.
    """
    if bits < 8:
        low = np.float32(scale) * np.float32(0 - zero_point)
        high = np.float32(scale) * np.float32(2**bits - 1 - zero_point)
        x = op.Clip(x, _scalar(low, np.float32, "low"), _scalar(high, np.float32, "high"))
    scale_node = _scalar(scale, np.float32, "scale")
    zero_node = _scalar(zero_point, np.uint8, "zero_point")
    return op.DequantizeLinear(op.QuantizeLinear(x, scale_node, zero_node), scale_node, zero_node)


def lower_dequantize(codes: Any, scale: Any, axis: int, bits: int) -> Any:
    """DequantizeLinear of stored codes; 4-bit codes are packed once the model is built."""
    return op.DequantizeLinear(codes, scale, axis=axis)


def lower_log_sqrt2(x: Any, scale: float, bits: int) -> Any:
    """The log-sqrt2 quantiser through a table of its ``2**bits`` values.

    ``code = clip(round(-2 log2(x / scale)), 0, 2**bits - 1)``, then a lookup. Zero has the last
    code: its logarithm is minus infinity, which the clip takes.
    """
    last = 2**bits - 1
    table = np.exp2(-0.5 * np.arange(last + 1, dtype=np.float32)) * np.float32(scale)
    table[last] = 0
    log = op.Log(op.Div(x, _scalar(scale, np.float32, "scale")))
    code = op.Round(op.Mul(log, _scalar(-2 / np.log(2), np.float32, "minus_two_over_ln2")))
    code = op.Clip(code, _scalar(0, np.float32, "zero"), _scalar(last, np.float32, "last"))
    values = op.Constant(value=ir.tensor(table.astype(np.float32), name="log_sqrt2_table"))
    return op.Gather(values, op.Cast(code, to=ir.DataType.INT64), axis=0)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=…)``."""
    ops = torch.ops.deploykit
    return {
        ops.fake_quantize.default: lower_fake_quantize,
        ops.dequantize.default: lower_dequantize,
        ops.fake_quantize_log_sqrt2.default: lower_log_sqrt2,
    }
