"""2:4 sparse linear layers on NVIDIA GPUs in torch, by cuSPARSELt.

``torch.sparse.to_sparse_semi_structured`` packs a weight for sparse tensor cores (compute
capability 8.0 and later). Written without a GPU at hand: shapes and refusals are tested, speed is
not known. Measure before relying on it; TensorRT is the usual way.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from deploykit.errors import TargetMissingError, UsageError, one_line
from deploykit.graph.two_four import is_two_of_four
from deploykit.types import PassRecord

__all__ = ["sparse_cuda_misfit", "to_sparse_cuda"]

_DTYPES = (torch.float16, torch.bfloat16)
_SIDE = 16  # cuSPARSELt in 16-bit floats: both sides of a weight are multiples of it
_CAPABILITY = (8, 0)


def sparse_cuda_misfit(weight: Tensor) -> str:
    """Why cuSPARSELt can't take a linear layer's weight (out, in), or "".

    Args:
        weight: any floating type and device; what counts is its shape and its zeros.
    """
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} axes"
    outputs, inputs = weight.shape
    if outputs % _SIDE or inputs % _SIDE:
        return f"{inputs} inputs, {outputs} outputs: both must be divisible by {_SIDE}"
    if not is_two_of_four(torch.where(weight == 0, 0, weight), 1):  # minus zero is zero, too
        return "its weight isn't 2:4 sparse"
    return ""


def to_sparse_cuda(
    module: nn.Module, dtype: torch.dtype = torch.float16
) -> tuple[nn.Module, PassRecord]:
    """A copy on the GPU in 16-bit floats whose 2:4 sparse linear layers run on sparse cores.

    Takes ``nn.Linear`` layers; give it the images in ``dtype``, on the GPU. cuSPARSELt wants the
    rows of a layer's input (tokens times images) divisible by 8; torch pads them else.

    Args:
        module: an nn.Module, left unchanged.
        dtype: torch.float16 or torch.bfloat16.

    Raises:
        UsageError: another dtype, or no layer that can run sparse.
        TargetMissingError: no GPU, an old one, or a torch without sparse kernels for it.
    """
    if dtype not in _DTYPES:
        raise UsageError(f"sparse tensor cores here take float16 and bfloat16, not {dtype}")
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    declined = {name: sparse_cuda_misfit(layer.weight) for name, layer in layers.items()}
    fit = [name for name, reason in declined.items() if not reason]
    if not fit:
        first = next(iter(declined.items()), None)
        why = f"{first[0]}: {first[1]}" if first else "it has no linear layers"
        raise UsageError(f"no layer of the model can run 2:4 sparse ({why})")
    _check_device()
    result = copy.deepcopy(module).to("cuda", dtype).eval()
    for name in fit:
        layer = result.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        try:
            packed = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        except (RuntimeError, NotImplementedError) as error:
            message = f"torch can't run {name} 2:4 sparse here: {one_line(error, 200)}"
            raise TargetMissingError(message) from error
        layer.weight = nn.Parameter(packed, requires_grad=False)
    record = PassRecord(
        name="sparse_cuda",
        summary=f"{len(fit)} of {len(layers)} linear layers on sparse tensor cores ({dtype})",
        details={"layers": fit, "declined": {n: r for n, r in declined.items() if r}},
    )
    return result, record


def _check_device() -> None:
    if not torch.cuda.is_available():
        raise TargetMissingError("2:4 sparse layers need an NVIDIA GPU, and torch sees none")
    found = torch.cuda.get_device_capability()
    if found < _CAPABILITY:
        message = (
            f"2:4 sparse layers need compute capability {_CAPABILITY[0]}.{_CAPABILITY[1]}, "
            f"this GPU has {found[0]}.{found[1]}"
        )
        raise TargetMissingError(message)
