"""TensorRT engines, built here without a GPU, and the ONNX they are built from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from deploykit.errors import DeploykitError
from deploykit.export.parity import compare, make_reference
from deploykit.export.registry import Source, get_exporter
from deploykit.export.tensorrt import (
    TensorrtExporter,
    TensorrtOptions,
)
from deploykit.export.tensorrt_fp8 import fake_quantize_fp8, to_fp8
from deploykit.export.tensorrt_onnx import is_sparse
from deploykit.export.tensorrt_program import kernel_types
from deploykit.export.tensorrt_reader import companion
from deploykit.graph.quantized import FLOAT, QuantizedModel
from deploykit.graph.signal import sqnr_db
from deploykit.prune.sparsity import SparsityOptions, sparsify
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quant.rounding.layer import Rounding
from deploykit.recipe_io import build_recipe
from deploykit.targets import nvidia
from tests.factories import make_artifact
from tests.graphs import batches, captured, images
from tests.tensorrt_models import (
    EXACT,
    MODELS,
    ONE_GPU,
    float_source,
    model_of,
    quantized,
    quantized_source,
    source_of,
    symmetric,
)


@pytest.fixture(autouse=True)
def _rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


def check_parity(model: QuantizedModel, name: str, path: Path, exporter: TensorrtExporter) -> None:
    """By the product's own rule, at two batch sizes."""
    reader = exporter.reader(path)
    assert reader is not None
    title, run = reader
    assert "not the engine" in title
    pixels = images(24)
    float_logits = model_of(name).graph_module(pixels)
    rounds = any(plan.input_bits != FLOAT for plan in model.plans)
    reference = make_reference("simulation", model, pixels, float_logits if rounds else None, 0)
    for batch in (1, 8):
        logits = torch.cat([run(part) for part in pixels.split(batch)])
        row = compare(make_artifact(), title, batch, logits, reference, "random")
        assert row.passed, row


# ── engines ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_int8_engine_keeps_our_codes_and_multiplies_integers(name: str, tmp_path: Path) -> None:
    model, path = quantized(name, 8, 8), tmp_path / "model.engine"
    exporter = TensorrtExporter(EXACT)
    done = exporter.export(quantized_source(name, 8, 8), path)
    assert path.stat().st_size > 100_000
    assert done.precision == "w8a8" and done.dynamic_batch
    split = 2 * 2 if name == "vit" else 0  # query, key and value of two blocks, split in three
    assert done.layers == {"int8": len(model.plans) + split}
    check_parity(model, name, path, exporter)
    reader = exporter.reader(path)
    assert reader is not None
    assert sqnr_db(model(images()), reader[1](images())) > 100  # the same codes everywhere


def test_four_bit_activations_are_the_same_codes_in_int8(tmp_path: Path) -> None:
    model, path = quantized("cnn", 4, 4), tmp_path / "model.engine"
    exporter = TensorrtExporter(EXACT)
    done = exporter.export(quantized_source("cnn", 4, 4), path)
    assert done.layers["int8"] == len(model.plans)
    file = onnx.load(companion(path))
    assert {node.op_type for node in file.graph.node} >= {"Clip", "QuantizeLinear"}
    check_parity(model, "cnn", path, exporter)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, FLOAT)])
def test_halves_are_within_the_noise(bits: tuple[int, int], tmp_path: Path) -> None:
    model, path = quantized("hybrid", *bits), tmp_path / "model.engine"
    exporter = TensorrtExporter(ONE_GPU)
    done = exporter.export(quantized_source("hybrid", *bits), path)
    assert any("float16" in note for note in done.notes)
    reader = exporter.reader(path)
    assert reader is not None
    pixels = images(16)
    found, wanted = reader[1](pixels), model(pixels)
    floats = model_of("hybrid").graph_module(pixels)
    assert sqnr_db(floats, found) > sqnr_db(floats, wanted) - 1.5
    assert sqnr_db(wanted, found) > min(sqnr_db(floats, wanted), 60.0)


def test_weight_only_weights_are_int4_in_the_file(tmp_path: Path) -> None:
    model, path = quantized("vit", 4, FLOAT), tmp_path / "model.engine"
    done = TensorrtExporter(ONE_GPU).export(quantized_source("vit", 4, FLOAT), path)
    expected = sum(plan.weight_bits == 4 for plan in model.plans)
    assert expected and done.layers["int4 weights"] == expected
    types = [tensor.data_type for tensor in onnx.load(companion(path)).graph.initializer]
    assert types.count(TensorProto.INT4) == expected
    assert "int8" not in done.layers


def test_float16_is_the_baseline(tmp_path: Path) -> None:
    path = tmp_path / "fp16.engine"
    done = TensorrtExporter(ONE_GPU).export(float_source("vit"), path)
    assert done.precision == "fp16"
    assert set(done.layers) == {"float16"}
    reader = TensorrtExporter(ONE_GPU).reader(path)
    assert reader is not None
    assert sqnr_db(model_of("vit").graph_module(images()), reader[1](images())) > 50


def test_float32_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "fp32.engine"
    done = TensorrtExporter(EXACT).export(float_source("cnn"), path)
    assert done.precision == "fp32" and set(done.layers) == {"float32"}
    types = {tensor.data_type for tensor in onnx.load(companion(path)).graph.initializer}
    assert TensorProto.FLOAT16 not in types


def test_batch_sizes_are_the_engine_s(tmp_path: Path) -> None:
    """The program checks its input against the profile, in words."""
    path = tmp_path / "model.engine"
    options = dataclasses.replace(ONE_GPU, batch=(2, 3, 6))
    done = TensorrtExporter(options).export(float_source("cnn"), path)
    assert done.dynamic_batch and b"out of bounds [2, 6]" in path.read_bytes()


def test_a_run_s_own_batch_is_the_engine_s(tmp_path: Path) -> None:
    recipe = build_recipe({"model": {"name": "x"}, "measure": {"batch_size": 64}}, "a test")
    assert recipe.batches == (64, 64)
    path = tmp_path / "model.engine"
    source = dataclasses.replace(float_source("cnn"), batches=recipe.batches)
    TensorrtExporter(ONE_GPU).export(source, path)
    assert b"out of bounds [1, 64]" in path.read_bytes()


def test_fixed_batch_and_several_gpus(tmp_path: Path) -> None:
    model = model_of("cnn")
    source = dataclasses.replace(source_of(model), dynamic_batch=False)
    one, two = tmp_path / "one.engine", tmp_path / "two.engine"
    TensorrtExporter(ONE_GPU).export(source, one)
    both = dataclasses.replace(ONE_GPU, capabilities=("SM80", "SM120"))
    done = TensorrtExporter(both).export(source, two)
    assert not done.dynamic_batch
    assert any("SM80, SM120" in note for note in done.notes)
    assert two.stat().st_size > one.stat().st_size
    assert b"out of bounds" not in one.read_bytes()
    assert onnx.load(companion(two)).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_registered_and_takes_a_ready_onnx_file(tmp_path: Path) -> None:
    exporter = get_exporter("tensorrt")
    assert (exporter.name, exporter.suffix, exporter.profile) == (
        "tensorrt", ".engine", "symmetric",
    )  # fmt: skip
    assert exporter.available() is None
    model = quantized("cnn", 8, 8)
    source = dataclasses.replace(quantized_source("cnn", 8, 8), metadata={"a": "b"})
    path = tmp_path / "model.engine"
    TensorrtExporter(EXACT).export(source, path)
    assert {p.key: p.value for p in onnx.load(companion(path)).metadata_props}["a"] == "b"
    check_parity(model, "cnn", path, TensorrtExporter(EXACT))


# ── two of four ───────────────────────────────────────────────────────────────────────────────


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 2, 1)  # 3 inputs: not eligible
        self.conv = nn.Conv2d(32, 64, 3, 2, 1)
        self.mlp = nn.Linear(64, 128)
        self.head = nn.Linear(128, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.stem(x))).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.mlp(x)).mean(1))


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("rounding", ["nearest", "erq"])
def test_two_of_four_zeros_are_found(bits: int | None, rounding: Rounding, tmp_path: Path) -> None:
    """Also after every change that quantising makes to weights."""
    torch.manual_seed(0)
    model: Any = sparsify(captured(Sparse()), SparsityOptions("2:4"))[0]
    if bits:
        options = QuantizeOptions(bits, bits, rounding=rounding)
        model = quantize(model, options, batches(count=4))
        symmetric(model.graph_module)
    path = tmp_path / "model.engine"
    done = TensorrtExporter(ONE_GPU).export(source_of(model, "x" if bits else "fp32"), path)
    assert done.layers["2:4 weights"] == 3
    assert any(note.startswith("3 of 4 layers have 2:4 zeros") for note in done.notes)


def test_sparse_means_along_the_inputs() -> None:
    weight = np.zeros((8, 16, 3, 3), np.int8)
    weight[:, ::2] = 1
    assert is_sparse(weight)
    weight[0, 1, 2, 2] = 1
    assert not is_sparse(weight)
    assert not is_sparse(np.zeros((8, 16)))
    assert not is_sparse(np.ones((4, 3)))
    assert not is_sparse(np.ones(4))


# ── FP8 ───────────────────────────────────────────────────────────────────────────────────────


def test_fp8_engine_computes_what_its_simulation_does(tmp_path: Path) -> None:
    model, pixels = model_of("vit"), images(16)
    graph_module = to_fp8(model, batches(count=8))
    floats, simulated = model.graph_module(pixels), graph_module(pixels)
    assert 15 < sqnr_db(floats, simulated) < 50  # it rounds, and not wildly
    path = tmp_path / "model.engine"
    exporter = TensorrtExporter(TensorrtOptions(library="tensorrt_rtx", floats="float32"))
    done = exporter.export(Source(graph_module, model.backbone, "fp8"), path)
    assert done.precision == "fp8"
    assert any("for SM89, SM120" in note for note in done.notes) or not nvidia.gpu_missing()
    assert done.layers["fp8"] >= 8  # two blocks of qkv, projection and two of the MLP
    reader = exporter.reader(path)
    assert reader is not None
    assert sqnr_db(simulated, reader[1](pixels)) > 60


def test_fp8_beside_halves(tmp_path: Path) -> None:
    model, pixels = model_of("hybrid"), images(16)
    graph_module = to_fp8(model, batches(count=8))
    path, exporter = tmp_path / "model.engine", TensorrtExporter(ONE_GPU)
    done = exporter.export(Source(graph_module, model.backbone, "fp8"), path)
    assert done.layers["fp8"] == 3  # two products and the head; convolutions stay float16
    assert done.layers["float16"] == 4
    reader = exporter.reader(path)
    assert reader is not None
    assert sqnr_db(graph_module(pixels), reader[1](pixels)) > 25


def test_fp8_grid() -> None:
    values = torch.tensor([0.0, 1.0, 1.0625, 1.1875, 448.0, 1e9, -1e9])
    found = fake_quantize_fp8(values, 1.0)
    assert found.tolist() == [0.0, 1.0, 1.0, 1.25, 448.0, 448.0, -448.0]


def test_fp8_wants_a_gpu_that_has_it(tmp_path: Path) -> None:
    model = model_of("hybrid")
    source = Source(to_fp8(model, batches(count=2)), model.backbone, "fp8")
    options = dataclasses.replace(ONE_GPU, capabilities=("SM80",))
    with pytest.raises(DeploykitError, match="fp8") as error:
        TensorrtExporter(options).export(source, tmp_path / "model.engine")
    assert "\n" not in str(error.value)


# ── the engine's program ──────────────────────────────────────────────────────────────────────

PROGRAM = """header {
  tensor={ dims={ 4 } name="codes" offset=0 type=int8 }
  tensor={ dims={ 4 } name="weight" offset=0 type=int8 }
  tensor={ dims={ 4 } name="values" offset=0 type=half }
}
  corrltn={ name="a" output={"x" } input={"codes" "weight" } layers="[ONNX Layer: a][ONNX Layer: q]" }
  fully_connected={ name="b" output={"x" } input={"values" "weight" } layers="[ONNX Layer: b]" }
  runtime_fusion={ name=__myl_CastMulCastFc input_args={ "codes" "values" } layers="[ONNX Layer: c]" }
  function={ name=__myl_AddMul input_args={ "values" } layers="[ONNX Layer: d]" }
  function={ name=_gemm_mha_v2 input_args={ "codes" "codes" } layers="[ONNX Layer: e][ONNX Layer: f]" }
  corrltn={ name="g" input={"codes" "weight" } layers="[ONNX Layer: g]" }
  corrltn={ name="g" input={"values" "values" } layers="[ONNX Layer: g]" }
"""  # noqa: E501


def test_kernel_types_of_a_program() -> None:
    found = kernel_types(PROGRAM.encode(), ["a", "b", "c", "d", "e", "f", "g"])
    assert found == {"int8": 3, "float16": 2}  # g differs between GPUs, d multiplies nothing
    assert kernel_types(b"\x00something else", ["a"]) == {}
