"""Questions to a converted MIL program: names, types, and what reads integer codes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from deploykit.errors import DeploykitError

__all__ = ["check_names", "computed_in_float32", "count_layers", "weight_codes"]

_PRODUCTS = ("conv", "linear", "matmul")
# They only move values, or, like a ReLU, keep codes what they are.
_MOVES = ("reshape", "transpose", "squeeze", "expand_dims", "split", "slice_by_index", "identity")
_CODES = {
    "constexpr_affine_dequantize": "quantized_data",
    "constexpr_blockwise_shift_scale": "data",
}


def check_names(function: Any, input_name: str, output_name: str) -> None:
    """Whether the program has the one input and the one output that were asked for.

    Raises:
        DeploykitError: it has others.
    """
    inputs, outputs = list(function.inputs), [var.name for var in function.outputs]
    if inputs != [input_name] or outputs != [output_name]:
        message = (
            f"wanted the input {input_name!r} and the output {output_name!r}, "
            f"coremltools made {inputs} and {outputs}"
        )
        raise DeploykitError(message)


def computed_in_float32(function: Any) -> dict[str, int]:
    """Operators with a float32 result by type, but for casts and weights."""
    from coremltools.converters.mil.mil import types

    kinds = Counter(
        op.op_type
        for op in function.operations
        if op.op_type not in ("const", "cast")
        and not op.op_type.startswith("constexpr_")
        and any(var.dtype == types.fp32 for var in op.outputs)
    )
    return dict(sorted(kinds.items()))


def weight_codes(function: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The codes of each weight as numpy int8, and what they are stored as, by weight's name."""
    codes, stored = {}, {}
    for op in function.operations:
        if op.op_type in _CODES:
            name, var = op.name.removesuffix("_cast_fp16"), op.inputs[_CODES[op.op_type]]
            codes[name], stored[name] = np.asarray(var.val).astype(np.int8), _integer_name(var)
    return codes, stored


def count_layers(function: Any) -> dict[str, int]:
    """Convolutions, linear layers and matrix products, by the codes of what they multiply."""
    counts: Counter[str] = Counter()
    for op in function.operations:
        if op.op_type in _PRODUCTS:
            inputs, weights = _kind(op.x), _kind(op.y if op.op_type == "matmul" else op.weight)
            if weights == "float":
                counts["float"] += 1
            elif inputs == "float":
                counts[f"{weights} weights"] += 1
            else:
                counts["int8" if weights == "int8" else f"{weights} weights, int8 inputs"] += 1
    return dict(sorted(counts.items()))


def _kind(var: Any) -> str:
    """What kind of codes a variable's values come from."""
    op = var.op
    while op is not None and op.op_type in _MOVES:
        op = op.x.op
    if op is None:
        return "float"
    if op.op_type == "dequantize":
        return "int8"
    if op.op_type == "constexpr_lut_to_dense":
        return "palette"
    if op.op_type in _CODES:
        return _integer_name(op.inputs[_CODES[op.op_type]])
    return "float"


def _integer_name(var: Any) -> str:
    from coremltools.converters.mil.mil import types

    return str(types.builtin_to_string(var.dtype))
