"""Which operators a saved structure may name. Nothing else is ever looked up by a file's words.

All overloads of the packets listed are allowed that write to none of their inputs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from deploykit.graph import levels as _levels  # noqa: F401  makes join_levels
from deploykit.graph import ops as _registered  # noqa: F401  makes torch.ops.deploykit

__all__ = ["SIZE_OPS", "find_op", "name_of"]

_NAME = re.compile(r"(aten|deploykit)\.([a-zA-Z_]\w{0,60})\.([a-zA-Z]\w{0,60})", re.ASCII)

_ATEN_NAMES = """
    _assert_tensor_metadata _log_softmax _softmax _to_copy _unsafe_view
    _upsample_bicubic2d_aa _upsample_bilinear2d_aa abs adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_max_pool2d add addmm alias amax amin arange argmax avg_pool1d
    avg_pool2d baddbmm batch_norm bitwise_and bitwise_not bmm cat ceil celu chunk clamp clamp_max
    clamp_min clone constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose2d convolution
    copy cos cumsum detach div dropout einsum elu embedding eq erf exp expand expand_as flatten
    flip floor floor_divide fmod full full_like gather ge gelu glu grid_sampler group_norm gt
    hardsigmoid hardswish hardtanh im2col index index_select instance_norm layer_norm le
    leaky_relu lerp lift_fresh_copy linalg_vector_norm linear log log2 log_softmax logical_and
    logical_not logical_or lt mT masked_fill matmul max max_pool1d max_pool2d maximum mean min
    minimum mish mm movedim mul narrow native_batch_norm native_group_norm native_layer_norm ne
    neg new_full new_ones new_zeros norm numpy_T ones ones_like pad permute pixel_shuffle
    pixel_unshuffle pow prelu prod reciprocal reflection_pad2d relu relu6 remainder repeat
    repeat_interleave replication_pad2d reshape reshape_as rms_norm roll round rsqrt rsub
    scalar_tensor scaled_dot_product_attention select select_scatter selu sigmoid sign silu sin
    slice slice_scatter softmax softplus split split_with_sizes sqrt square squeeze stack std sub
    sum swapaxes swapdims sym_numel sym_size t tanh tensor_split tile to topk transpose tril triu
    type_as unbind unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d
    upsample_nearest2d var var_mean view view_as where zeros zeros_like
"""
_ATEN = frozenset(_ATEN_NAMES.split())
_DEPLOYKIT = frozenset(
    {"dequantize", "fake_quantize", "fake_quantize_log", "fake_quantize_twin", "join_levels"}
)

_PYTHON: dict[str, Callable[..., Any]] = {
    "python.add": operator.add,
    "python.eq": operator.eq,
    "python.floordiv": operator.floordiv,
    "python.ge": operator.ge,
    "python.getitem": operator.getitem,
    "python.gt": operator.gt,
    "python.le": operator.le,
    "python.lt": operator.lt,
    "python.mod": operator.mod,
    "python.mul": operator.mul,
    "python.ne": operator.ne,
    "python.neg": operator.neg,
    "python.sub": operator.sub,
    "python.truediv": operator.truediv,
    "torch.sym_float": torch.sym_float,
    "torch.sym_int": torch.sym_int,
    "torch.sym_max": torch.sym_max,
    "torch.sym_min": torch.sym_min,
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}

SIZE_OPS = frozenset(_PYTHON) - {"python.getitem"}
"""Arithmetic on sizes: its inputs must be numbers, or it could repeat a list without end."""


def name_of(target: object) -> str | None:
    """The name under which an operator is saved; None where it isn't allowed."""
    if isinstance(target, torch._ops.OpOverload):
        packet, overload = target._schema.name.replace("::", "."), target._overloadname
        name = f"{packet}.{overload}"
        return name if find_op(name) is target else None
    try:
        return _PYTHON_NAMES.get(target)  # type: ignore[call-overload, no-any-return]
    except TypeError:  # not hashable
        return None


@cache
def find_op(name: str) -> Callable[..., Any] | None:
    """The operator of that name; None where there is none or it isn't allowed."""
    if name in _PYTHON:
        return _PYTHON[name]
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    space, packet_name, overload = match.groups()
    if packet_name not in (_ATEN if space == "aten" else _DEPLOYKIT):
        return None
    packet = getattr(getattr(torch.ops, space), packet_name, None)
    if packet is None or overload not in packet.overloads():
        return None
    found: torch._ops.OpOverload = getattr(packet, overload)
    writes = found._schema.is_mutable or any(a.is_out for a in found._schema.arguments)
    return None if writes else found
