"""Tiny models as sources for TensorRT, each made once."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from deploykit.export.onnx import onnx_bytes
from deploykit.export.registry import Source
from deploykit.export.tensorrt import (
    TensorrtOptions,
)
from deploykit.export.tensorrt_onnx import to_dialect
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import QuantizedModel
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.graphs import batches, captured, nodes_of, tiny_cnn, tiny_vit
from tests.tiny_models import tiny_hybrid

MODELS = {"cnn": tiny_cnn, "vit": tiny_vit, "hybrid": tiny_hybrid}
ONE_GPU = TensorrtOptions(library="tensorrt_rtx", capabilities=("SM89",))
FILES = tempfile.TemporaryDirectory()  # gone when the process ends
EXACT = dataclasses.replace(ONE_GPU, floats="float32")


def symmetric(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every uniform activation quantiser made symmetric, in place."""
    for node in nodes_of(graph_module, torch.ops.deploykit.fake_quantize.default):
        x, scale, zero, bits = node.args
        widest = scale * max(zero, 2**bits - 1 - zero)
        step = torch.tensor(widest / (2 ** (bits - 1) - 1), dtype=torch.float32).item()
        node.args = (x, step, 2 ** (bits - 1), bits)
    graph_module.recompile()
    return graph_module


@cache
def model_of(name: str) -> CapturedModel:
    return captured(MODELS[name]())


@cache
def quantized(name: str, weights: int, inputs: int) -> QuantizedModel:
    model = quantize(model_of(name), QuantizeOptions(weights, inputs), batches(count=8))
    symmetric(model.graph_module)
    return model


@cache
def float_source(name: str) -> Source:
    """With its ONNX file, which takes longer to make than an engine."""
    return with_file(source_of(model_of(name)), f"{name}.onnx")


@cache
def quantized_source(name: str, weights: int, inputs: int) -> Source:
    model = quantized(name, weights, inputs)
    return with_file(source_of(model, model.bits), f"{name}-{model.bits}.onnx")


def with_file(source: Source, name: str) -> Source:
    file = Path(FILES.name) / name
    file.write_bytes(onnx_bytes(source.graph_module, source.backbone))
    return dataclasses.replace(source, onnx=file)


def source_of(model: CapturedModel | QuantizedModel, precision: str = "fp32") -> Source:
    return Source(model.graph_module, model.backbone, precision)


def dialect_of(source: Source, *, half: bool) -> tuple[ir.Model, Any]:
    assert source.onnx is not None
    model = ir.from_proto(onnx.load(source.onnx))
    return model, to_dialect(model, half=half)


class OneQuantizer(nn.Module):
    def __init__(self, zero_point: int, bits: int) -> None:
        super().__init__()
        self.zero_point, self.bits = zero_point, bits

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.deploykit.fake_quantize(x, 0.125, self.zero_point, self.bits)
        return x.flatten(2).mean(-1)
