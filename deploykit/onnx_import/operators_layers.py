"""Operators with weights. Constant weights become torch's own layers, found again by passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.onnx_import.graph import Array, Graph, Node
from deploykit.onnx_import.operators import UnsupportedError, integers, operator

__all__ = ["LAYERS", "make_layer"]

_EDGES = {"SAME_UPPER", "SAME_LOWER"}


def make_layer(node: Node, graph: Graph) -> nn.Module | None:
    """The torch layer with the node's weights, or None if it isn't a layer with constant weights.

    Raises:
        UnsupportedError: such a layer, but of a form that isn't known.
    """
    make = LAYERS.get(node.op)
    if make is None:
        return None
    weights = [None if not name else graph.constants.get(name) for name in node.inputs[1:]]
    given = [name for name in node.inputs[1:] if name]
    if not given or any(name not in graph.constants for name in given):
        return None
    layer: nn.Module | None = make(node, *weights)
    return None if layer is None else layer.eval().requires_grad_(False)


def _conv(node: Node, weight: Array, bias: Array | None = None) -> Any:
    if weight.ndim != 4:
        raise UnsupportedError(f"a convolution over {weight.ndim - 2} dimensions")
    group = node.get("group", 1)
    options = {
        "stride": tuple(node.get("strides", (1, 1))),
        "dilation": tuple(node.get("dilations", (1, 1))),
        "groups": group,
        "bias": bias is not None,
    }
    outputs, inputs, *kernel = weight.shape
    before = _pads(node)
    layer = nn.utils.skip_init(
        nn.Conv2d,
        inputs * group,
        outputs,
        tuple(kernel),
        padding=before if isinstance(before, tuple) else 0,
        **options,
    )
    return _filled(layer, weight, bias)


def _linear(node: Node, weight: Array, bias: Array | None = None) -> Any:
    """Gemm, or a MatMul whose second factor is a matrix (with the bias ``fuse.py`` found)."""
    if weight.ndim != 2 or node.get("transA", 0):
        return None
    scale, shift = node.get("alpha", 1.0), node.get("beta", 1.0)
    matrix = weight if node.get("transB", 0) else weight.T
    if bias is not None:
        bias = np.broadcast_to(np.squeeze(bias), (matrix.shape[0],)) * np.float32(shift)
    layer = nn.utils.skip_init(nn.Linear, matrix.shape[1], matrix.shape[0], bias=bias is not None)
    return _filled(layer, matrix * np.float32(scale), bias)


def _batch_norm(node: Node, scale: Array, bias: Array, mean: Array, variance: Array) -> nn.Module:
    if node.get("training_mode", 0) or len(node.outputs) > 1:
        raise UnsupportedError("a BatchNormalization in training mode")
    layer = nn.BatchNorm2d(len(scale), eps=node.get("epsilon", 1e-5))
    _filled(layer, scale, bias)
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.copy_(torch.from_numpy(mean))
    layer.running_var.copy_(torch.from_numpy(variance))
    return layer


def _layer_norm(node: Node, scale: Array, bias: Array | None = None) -> Any:
    if node.get("axis", -1) != -1 or scale.ndim != 1 or len(node.outputs) > 1:
        return None
    options: dict[str, Any] = {"eps": node.get("epsilon", 1e-5), "bias": bias is not None}
    return _filled(nn.LayerNorm(scale.shape[0], **options), scale, bias)


def _group_norm(node: Node, scale: Array, bias: Array) -> Any:
    """Made by ``fuse.py``, or ONNX's own from opset 21 on (one scale for each channel)."""
    groups = node.get("num_groups")
    if node.opset < 21:
        raise UnsupportedError("GroupNormalization before opset 21 (it has one scale a group)")
    layer = nn.GroupNorm(groups, len(scale), eps=node.get("epsilon", 1e-5))
    return _filled(layer, scale, bias)


LAYERS: dict[str, Any] = {
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Gemm": _linear,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _linear,
}


@torch.no_grad()
def _filled(layer: Any, weight: Array, bias: Array | None) -> Any:
    if weight.dtype != np.float32 or (bias is not None and bias.dtype != np.float32):
        raise UnsupportedError("weights of a layer that aren't float32")
    if layer.weight.shape != weight.shape:
        raise UnsupportedError(f"weights of shape {weight.shape} in {type(layer).__name__}")
    layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
    if bias is not None:
        if layer.bias.shape != bias.shape:
            raise UnsupportedError(f"a bias of shape {bias.shape} in {type(layer).__name__}")
        layer.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
    return layer


def _pads(node: Node) -> tuple[int, int] | list[int] | None:
    """Symmetric padding as a pair, other padding as (left, right, top, bottom).

    None where it depends on the input's size (``auto_pad``).
    """
    automatic = node.get("auto_pad", "NOTSET")
    if automatic in _EDGES:
        return None
    pads = list(node.get("pads", (0, 0, 0, 0)))
    if automatic == "VALID" or not any(pads):
        return 0, 0
    if len(pads) != 4:
        raise UnsupportedError(f"operator {node.op} over {len(pads) // 2} dimensions")
    top, left, bottom, right = pads
    return (top, left) if (top, left) == (bottom, right) else [left, right, top, bottom]


def padded(node: Node, x: Tensor, kernel: list[int], fill: float = 0.0) -> Tensor:
    """The input with the padding that the layer itself can't be told of."""
    pads = _pads(node)
    if isinstance(pads, tuple):
        return x
    if pads is None:
        pads = []
        strides, dilations = node.get("strides", (1, 1)), node.get("dilations", (1, 1))
        for axis in (1, 0):
            size, stride = int(x.shape[2 + axis]), strides[axis]
            reach = dilations[axis] * (kernel[axis] - 1) + 1
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
            less, more = total // 2, total - total // 2
            upper = node.get("auto_pad") == "SAME_UPPER"
            pads += [less, more] if upper else [more, less]
    return F.pad(x, pads, value=fill) if any(pads) else x


@operator("BatchNormalization", "Conv", "GroupNormalization")
def not_constant(node: Node, *values: Any) -> Tensor:
    raise UnsupportedError(f"a {node.op} whose weights aren't constant")


@operator("Gemm")
def gemm(node: Node, a: Tensor, b: Tensor, c: Any = None) -> Tensor:
    a = a.transpose(0, 1) if node.get("transA", 0) else a
    b = b.transpose(0, 1) if node.get("transB", 0) else b
    result = torch.matmul(a, b)
    if node.get("alpha", 1.0) != 1:
        result = result * node.get("alpha")
    return result if c is None else result + c * node.get("beta", 1.0)


@operator("LayerNormalization")
def layer_norm(node: Node, x: Tensor, scale: Any, bias: Any = None) -> Tensor:
    """Over more than the last dimension."""
    axis = node.get("axis", -1)
    if len(node.outputs) > 1:
        raise UnsupportedError("a LayerNormalization with more than one output")
    shape = [int(size) for size in x.shape[axis:]]
    result = F.layer_norm(x, shape, eps=node.get("epsilon", 1e-5)) * scale
    shifted: Tensor = result if bias is None else result + bias
    return shifted


@operator("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, scale: Any, bias: Any) -> Tensor:
    """One channel has one scale, which comes as a number."""
    weights = [v if isinstance(v, Tensor) else torch.full((1,), v) for v in (scale, bias)]
    return F.instance_norm(x, weight=weights[0], bias=weights[1], eps=node.get("epsilon", 1e-5))


@operator("GlobalAveragePool")
def global_average_pool(node: Node, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1) if x.ndim == 4 else x.mean(-1, keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(node: Node, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("AveragePool", "MaxPool")
def pool(node: Node, x: Tensor) -> Tensor:
    kernel = list(node.get("kernel_shape"))
    if x.ndim != 4 or len(node.outputs) > 1:
        raise UnsupportedError(f"operator {node.op} but on images, with one output")
    strides, ceil = list(node.get("strides", (1, 1))), bool(node.get("ceil_mode", 0))
    pads, dilations = _pads(node), list(node.get("dilations", (1, 1)))
    inside = list(pads) if isinstance(pads, tuple) else [0, 0]
    if node.op == "MaxPool":
        x = padded(node, x, kernel, float("-inf"))
        return F.max_pool2d(x, kernel, strides, inside, dilations, ceil)
    whole = bool(node.get("count_include_pad", 0))
    if (not isinstance(pads, tuple) and not whole) or dilations != [1, 1]:
        raise UnsupportedError("an AveragePool with uneven padding or dilation")
    return F.avg_pool2d(padded(node, x, kernel), kernel, strides, inside, ceil, whole)


@operator("Resize", described=(1, 2, 3))
def resize(
    node: Node,
    x: Tensor,
    roi: Array | None = None,
    scales: Array | None = None,
    sizes: Array | None = None,
) -> Tensor:
    if x.ndim != 4 or "axes" in node.attributes:
        raise UnsupportedError("a Resize but of images")
    if sizes is not None and sizes.size:
        size = integers(sizes, "sizes of Resize")[2:]
    elif isinstance(scales, np.ndarray) and scales.size == 4:
        sides = zip(x.shape[2:], scales[2:], strict=True)
        size = [int(side * float(scale)) for side, scale in sides]
    else:
        raise UnsupportedError("a Resize without constant sizes or scales")
    mode, where = node.get("mode", "nearest"), node.get("coordinate_transformation_mode")
    where = where or "half_pixel"
    if mode == "nearest" and where == "asymmetric" and node.get("nearest_mode") == "floor":
        return F.interpolate(x, size, mode="nearest")
    kinds = {"linear": "bilinear", "cubic": "bicubic"}
    if mode in kinds and where in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        return F.interpolate(x, size, mode=kinds[mode], align_corners=where == "align_corners")
    raise UnsupportedError(f"a Resize of mode {mode} with {where} coordinates")
