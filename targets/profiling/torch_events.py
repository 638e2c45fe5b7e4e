"""What torch's profiler tells of one call: its events, and what each of them computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from deploykit.targets.profiling.kernels import Kind
from deploykit.targets.torch_graph import import_torch

__all__ = ["MOVES", "kind_of", "operators_in", "precision_of", "profiled_call"]

_PRODUCT = re.compile(
    r"::_?(convolution|conv[123]d|conv_transpose[123]d|\w*_conv\w*|linear|\w*_linear\w*|matmul|"
    r"mm|bmm|addmm|baddbmm|einsum|scaled_dot_product\w*)$"
)
_OPERATOR = re.compile(r"(aten|deploykit|mkldnn|mkl|onednn)::")

_CALL = "deploykit call"

MOVES = (
    "_to_copy", "_unsafe_view", "alias", "as_strided", "cat", "chunk", "clone", "constant_pad_nd",
    "contiguous", "copy_", "copy", "detach", "expand", "expand_as", "flatten", "flip", "gather",
    "getitem", "index", "index_select", "lift_fresh", "narrow", "pad", "permute", "pixel_shuffle",
    "pixel_unshuffle", "repeat", "reshape",
    "resolve_conj", "resolve_neg", "roll", "select", "slice", "split_with_sizes", "split",
    "squeeze", "stack", "swapaxes", "tile", "to", "transpose", "t", "unbind", "unflatten",
    "unsqueeze", "view",
)  # fmt: skip
"""Names of torch's operators that move, reorder or cast values."""

# by C++'s names of the types, which the profiler gives
_TYPES = {
    "float": "float32", "double": "float64", "c10::Half": "float16", "c10::BFloat16": "bfloat16",
    "signed char": "int8", "unsigned char": "int8", "int": "int32", "long int": "int64",
    "long": "int64", "bool": "bool",
}  # fmt: skip


def profiled_call(call: Callable[[], object], *, gpu: bool, shapes: bool) -> list[Any]:
    """The events of one call, on the CPU's side, in the order they began.

    Args:
        gpu: whether the GPU's kernels are recorded, too, with the event that launched each.
        shapes: whether inputs' shapes and types are kept, which slows small operators down.
    """
    torch = import_torch()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    range_of = torch.profiler.record_function
    with torch.profiler.profile(activities=activities, record_shapes=shapes) as found:
        with range_of("deploykit warm-up"):
            torch.empty(1)  # the first event pays for the profiler's start
        with range_of(_CALL):
            call()
    on_cpu = torch.autograd.DeviceType.CPU
    events = [event for event in found.events() if event.device_type == on_cpu]
    events.sort(key=lambda event: float(event.time_range.start))
    first = next(index for index, event in enumerate(events) if event.name == _CALL)
    return events[first + 1 :]


def kind_of(operator: str) -> Kind:
    """What an operator such as ``aten::addmm`` does."""
    if _PRODUCT.search(operator):
        return "compute"
    if operator.startswith("deploykit::"):
        return "quantise"  # codes from floats, or floats from codes: simulated in floats
    return "reformat" if operator.partition("::")[2] in MOVES else "other"


def operators_in(event: Any) -> list[Any]:
    """The operator that an event called first, and the way down to what computes for it.

    The last is the innermost product, such as ``aten::mkldnn_convolution`` in ``aten::conv2d``;
    only the first is given where nothing in it is a product. Empty where no operator was called.
    """
    own = next((child for child in event.cpu_children if _OPERATOR.match(child.name)), None)
    if own is None:
        return []
    chain = [own]
    while (inner := next((c for c in chain[-1].cpu_children if _is_product(c)), None)) is not None:
        chain.append(inner)
    return chain


def _is_product(event: Any) -> bool:
    return kind_of(event.name) == "compute"


def precision_of(event: Any) -> str:
    """Of the first tensor that an operator read; empty where its types weren't kept."""
    named = (_TYPES.get(name) for name in event.input_dtypes or ())
    return next((name for name in named if name is not None), "")
