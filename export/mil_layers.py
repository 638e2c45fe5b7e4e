"""MIL operators of layers and of quantisation, in torch; see ``mil_ops``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deploykit.export.mil_ops import Call, mil_op

_LOWEST = {"uint8": 0, "int8": -128}


@mil_op("conv")
def _conv(call: Call) -> Tensor:
    x, weight, bias = call.tensor("x"), call.tensor("weight"), call.get("bias")
    spatial = weight.ndim - 2
    stride = call.integers("strides") or [1] * spatial
    dilation = call.integers("dilations") or [1] * spatial
    x = _padded(call, x, list(weight.shape[2:]), stride, dilation)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]
    result: Tensor = convolve(
        x, weight, bias, stride, 0, dilation, groups=call.integer("groups", 1)
    )
    return result


def _padded(
    call: Call,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    value: float = 0,
) -> Tensor:
    """``x`` padded as ``pad_type`` says."""
    kind = call.text("pad_type", "valid")
    pads = call.integers("pad")
    if kind == "valid":
        return x
    if kind in ("same", "same_lower"):
        pads = []
        for axis, (size, step, wide) in enumerate(zip(kernel, stride, dilation, strict=True)):
            length = x.shape[2 + axis]
            total = max((-(-length // step) - 1) * step + wide * (size - 1) + 1 - length, 0)
            less, more = total // 2, total - total // 2
            pads += [less, more] if kind == "same" else [more, less]
    elif kind != "custom":
        message = f"pad_type {kind!r} is not known in torch"
        raise NotImplementedError(message)
    pairs = [pads[i : i + 2] for i in range(0, len(pads), 2)]
    return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)


@mil_op("max_pool", "avg_pool")
def _pool(call: Call) -> Tensor:
    x, kernel = call.tensor("x"), call.integers("kernel_sizes")
    stride = call.integers("strides") or [1] * len(kernel)
    if len(kernel) != 2 or call.flag("ceil_mode"):
        message = "pooling that isn't 2-D, or rounds up, is not known in torch"
        raise NotImplementedError(message)
    once = [1] * len(kernel)
    if call.op.op_type == "max_pool":
        padded = _padded(call, x, kernel, stride, once, value=-torch.inf)
        return F.max_pool2d(padded, kernel, stride)
    mean = F.avg_pool2d(_padded(call, x, kernel, stride, once), kernel, stride)
    if not call.flag("exclude_padding_from_average"):
        return mean
    share = F.avg_pool2d(_padded(call, torch.ones_like(x), kernel, stride, once), kernel, stride)
    return mean / share


@mil_op("linear")
def _linear(call: Call) -> Tensor:
    return F.linear(call.tensor("x"), call.tensor("weight"), call.get("bias"))


@mil_op("matmul")
def _matmul(call: Call) -> Tensor:
    x, y = call.tensor("x"), call.tensor("y")
    x = x.transpose(-1, -2) if call.flag("transpose_x") else x
    y = y.transpose(-1, -2) if call.flag("transpose_y") else y
    return x @ y


@mil_op("scaled_dot_product_attention")
def _attention(call: Call) -> Tensor:
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=call.get("attn_mask"))


@mil_op("softmax")
def _softmax(call: Call) -> Tensor:
    return F.softmax(call.tensor("x"), call.integer("axis", -1))


@mil_op("gelu")
def _gelu(call: Call) -> Tensor:
    x, mode = call.tensor("x"), call.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


@mil_op("leaky_relu")
def _leaky_relu(call: Call) -> Tensor:
    return F.leaky_relu(call.tensor("x"), call.number("alpha", 0.01))


@mil_op("elu")
def _elu(call: Call) -> Tensor:
    return F.elu(call.tensor("x"), call.number("alpha", 1.0))


@mil_op("prelu")
def _prelu(call: Call) -> Tensor:
    return F.prelu(call.tensor("x"), call.tensor("alpha"))


@mil_op("sigmoid_hard")
def _sigmoid_hard(call: Call) -> Tensor:
    return (call.tensor("x") * call.number("alpha", 0.2) + call.number("beta", 0.5)).clamp(0, 1)


@mil_op("thresholded_relu")
def _thresholded_relu(call: Call) -> Tensor:
    x = call.tensor("x")
    return torch.where(x >= call.number("alpha", 1.0), x, torch.zeros_like(x))


@mil_op("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Tensor:
    return F.pixel_shuffle(call.tensor("x"), call.integer("upscale_factor"))


@mil_op("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Tensor:
    return F.pixel_unshuffle(call.tensor("x"), call.integer("downscale_factor"))


@mil_op("layer_norm")
def _layer_norm(call: Call) -> Tensor:
    x = call.tensor("x")
    axes = sorted(axis % x.ndim for axis in call.integers("axes")) or list(range(x.ndim))
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    result = (x - mean) / torch.sqrt(variance + call.number("epsilon", 1e-5))
    shape = [x.shape[axis] if axis in axes else 1 for axis in range(x.ndim)]
    if call.get("gamma") is not None:
        result = result * call.tensor("gamma").reshape(shape)
    if call.get("beta") is not None:
        result = result + call.tensor("beta").reshape(shape)
    return result


@mil_op("batch_norm")
def _batch_norm(call: Call) -> Tensor:
    return F.batch_norm(
        call.tensor("x"),
        call.tensor("mean"),
        call.tensor("variance"),
        call.get("gamma"),
        call.get("beta"),
        eps=call.number("epsilon", 1e-5),
    )


@mil_op("instance_norm")
def _instance_norm(call: Call) -> Tensor:
    return F.instance_norm(
        call.tensor("x"),
        weight=call.get("gamma"),
        bias=call.get("beta"),
        eps=call.number("epsilon", 1e-5),
    )


@mil_op("quantize")
def _quantize(call: Call) -> Tensor:
    x, lowest = call.tensor("input"), _LOWEST[call.text("output_dtype")]
    codes = torch.round(x / _along(call, "scale", x)) + _along(call, "zero_point", x)
    return codes.clamp(lowest, lowest + 255).to(torch.int32)


@mil_op("dequantize")
def _dequantize(call: Call) -> Tensor:
    codes = call.tensor("input").float()
    return (codes - _along(call, "zero_point", codes)) * _along(call, "scale", codes)


def _along(call: Call, name: str, x: Tensor) -> Tensor:
    """A scalar or a vector along ``axis`` so that it broadcasts with ``x``; 0 if not given."""
    value = call.get(name)
    if value is None:
        return torch.zeros(())
    if value.ndim == 0:
        return torch.as_tensor(value.float())
    shape = [1] * x.ndim
    shape[call.integer("axis")] = -1
    return torch.as_tensor(value.float().reshape(shape))


@mil_op("constexpr_affine_dequantize")
def _constexpr_affine(call: Call) -> Tensor:
    codes = call.tensor("quantized_data").float()
    return (codes - _along(call, "zero_point", codes)) * _along(call, "scale", codes)


@mil_op("constexpr_blockwise_shift_scale")
def _constexpr_blockwise(call: Call) -> Tensor:
    codes, scale = call.tensor("data").float(), call.tensor("scale")
    if call.get("offset") is not None:
        codes = codes - _blocks(call.tensor("offset").float(), codes)
    return codes * _blocks(scale, codes)


def _blocks(scale: Tensor, like: Tensor) -> Tensor:
    """Each value repeated over its block."""
    for axis, (count, size) in enumerate(zip(scale.shape, like.shape, strict=True)):
        scale = scale.repeat_interleave(size // count, axis)
    return scale


@mil_op("constexpr_lut_to_dense")
def _constexpr_lut(call: Call) -> Tensor:
    """A palette: coremltools unpacks its indices, whose form depends on the system."""
    return torch.from_numpy(call.op.materialized_val_inference()).float()
