"""The ONNX that TensorRT engines are built from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from deploykit.errors import DeploykitError
from deploykit.export.tensorrt import (
    TensorrtExporter,
)
from deploykit.export.tensorrt_onnx import to_dialect
from deploykit.graph.quantized import FLOAT
from deploykit.graph.signal import sqnr_db
from tests.graphs import captured, images, nodes_of
from tests.tensorrt_models import (
    EXACT,
    ONE_GPU,
    OneQuantizer,
    dialect_of,
    quantized,
    quantized_source,
    source_of,
)


@pytest.fixture(autouse=True)
def _rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


# ── the dialect ───────────────────────────────────────────────────────────────────────────────


def test_signed_codes_and_float_biases_only() -> None:
    model, found = dialect_of(quantized_source("cnn", 8, 8), half=False)
    assert found.integer_layers == found.layers == 5
    types = [value.dtype for value in model.graph.initializers.values()]
    assert ir.DataType.UINT8 not in types and ir.DataType.INT32 not in types
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2:
            zero = ir.convenience.get_const_tensor(node.inputs[2])
            assert zero is not None and zero.numpy() == 0 and zero.numpy().dtype == np.int8


@pytest.mark.parametrize("zero_point", [0, 5, 15])
def test_narrow_codes_fit_int8_with_any_zero_point(zero_point: int, tmp_path: Path) -> None:
    """The grid of an asymmetric 4-bit quantiser lies inside int8's, so nothing is lost."""
    model, path = captured(OneQuantizer(zero_point, 4)), tmp_path / "model.engine"
    exporter = TensorrtExporter(EXACT)
    exporter.export(source_of(model), path)
    reader = exporter.reader(path)
    assert reader is not None
    pixels = 3 * images()
    torch.testing.assert_close(reader[1](pixels), model.graph_module(pixels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero_point", [0, 127, 129, 255])
def test_asymmetric_bytes_are_refused(zero_point: int, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    with pytest.raises(DeploykitError, match="symmetric activations") as error:
        TensorrtExporter(EXACT).export(source_of(captured(OneQuantizer(zero_point, 8))), path)
    assert "\n" not in str(error.value) and f"zero point {zero_point}:" in str(error.value)
    assert not path.exists()


@pytest.mark.parametrize(("inputs", "parts"), [(8, 3), (FLOAT, 0)])
def test_packed_attention_layers_are_split(inputs: int, parts: int) -> None:
    model, found = dialect_of(quantized_source("vit", 8 if parts else 4, inputs), half=False)
    names = [str(node.name) for node in model.graph if "_part" in str(node.name)]
    assert len([name for name in names if name.endswith("dequantize")]) == 2 * parts
    assert bool(found.notes) == bool(parts)
    shapes = {
        tuple(ir.convenience.get_const_tensor(node.inputs[0]).shape)  # type: ignore[union-attr]
        for node in model.graph
        if str(node.name) in names and node.op_type == "DequantizeLinear"
    }
    assert shapes == ({(32, 32)} if parts else set())


def test_tables_become_floats() -> None:
    model, found = dialect_of(quantized_source("vit", 4, 4), half=True)
    assert found.tables == 2  # the softmaxes of two blocks
    gathers = [node for node in model.graph if node.op_type == "Gather"]
    tables = [ir.convenience.get_const_tensor(node.inputs[0]) for node in gathers]
    assert sum(one is not None and one.dtype == ir.DataType.FLOAT16 for one in tables) == 2
    logs = [node for node in model.graph if node.op_type == "Log"]
    assert logs and all(node.outputs[0].dtype == ir.DataType.FLOAT for node in logs)


def test_normalisations_stay_float32_and_scales_are_kept() -> None:
    graph_module = quantized("vit", 8, 8).graph_module
    model, _ = dialect_of(quantized_source("vit", 8, 8), half=True)
    norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert norms and all(node.outputs[0].dtype == ir.DataType.FLOAT for node in norms)
    fused = [node for node in model.graph if node.op_type in ("MatMul", "Softmax")]
    assert fused and all(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in fused)
    scales = {
        ir.convenience.get_const_tensor(node.inputs[1]).numpy().item()  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "QuantizeLinear"
    }
    quantizers = nodes_of(graph_module, torch.ops.deploykit.fake_quantize.default)
    assert scales == {np.float32(node.args[1]).item() for node in quantizers}
    assert model.graph.inputs[0].dtype == model.graph.outputs[0].dtype == ir.DataType.FLOAT


class Extremes(nn.Module):
    """Constants that float16 can't hold."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mean(-1)
        x = x / (x * x).sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
        return x.masked_fill(x > 10, -3e38)


def test_half_constants_are_finite_and_not_zero(tmp_path: Path) -> None:
    model, path = captured(Extremes()), tmp_path / "model.engine"
    exporter = TensorrtExporter(ONE_GPU)
    exporter.export(source_of(model), path)
    reader = exporter.reader(path)
    assert reader is not None
    assert torch.isfinite(reader[1](torch.zeros(1, 3, 32, 32))).all()
    assert sqnr_db(model.graph_module(images()), reader[1](images())) > 50


def test_tiny_scales_keep_int8_codes_beside_halves() -> None:
    """float16 would round a scale of 1e-6 to a handful of digits."""
    source = quantized_source("vit", 4, FLOAT)
    _, before = dialect_of(source, half=True)
    assert source.onnx is not None
    model = ir.from_proto(onnx.load(source.onnx))
    packed = next(node for node in model.graph if node.op_type == "Cast").outputs[0]
    scale = next(user for user, _ in packed.uses()).inputs[1]
    assert scale is not None and scale.const_value is not None
    values = scale.const_value.numpy().copy()
    values[0] = 1e-6
    scale.const_value = ir.tensor(values, name=scale.name)
    after = to_dialect(model, half=True)
    assert after.int4_layers == before.int4_layers - 1


class Clamped(nn.Module):
    """A quantiser after a clamp of the model's own, with one bound."""

    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.deploykit.fake_quantize(x.clamp(self.low, self.high), 0.125, 0, 8)
        return x.flatten(2).mean(-1)


def test_a_clamp_can_make_codes_fit(tmp_path: Path) -> None:
    """Codes of 0 to 6 in steps of 1/8 fit int8 without a zero point; those of 0 up don't."""
    model, path = captured(Clamped(0.0, 6.0)), tmp_path / "model.engine"
    exporter = TensorrtExporter(EXACT)
    exporter.export(source_of(model), path)
    reader = exporter.reader(path)
    assert reader is not None
    pixels = 5 * images()
    torch.testing.assert_close(reader[1](pixels), model.graph_module(pixels), rtol=0, atol=1e-6)
    with pytest.raises(DeploykitError, match="symmetric activations"):
        exporter.export(source_of(captured(Clamped(0.0, None))), tmp_path / "no.engine")
