"""TensorRT engines, built here without a GPU, and the ONNX they are built from."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, fx, nn

from deploykit import _tensorrt
from deploykit.errors import DeploykitError, TargetMissingError, UsageError
from deploykit.export import tensorrt_build
from deploykit.export.onnx import onnx_bytes
from deploykit.export.parity import compare, make_reference
from deploykit.export.registry import Source, get_exporter
from deploykit.export.tensorrt import (
    TensorrtExporter,
    TensorrtOptions,
    ask_builder,
    export_fp16_baseline,
)
from deploykit.export.tensorrt_fp8 import fake_quantize_fp8, to_fp8
from deploykit.export.tensorrt_onnx import is_sparse, to_dialect
from deploykit.export.tensorrt_program import kernel_types
from deploykit.export.tensorrt_reader import companion
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import FLOAT, QuantizedModel
from deploykit.graph.signal import sqnr_db
from deploykit.prune.semi_structured import sparsify_2_4
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.graphs import batches, captured, images, nodes_of, tiny_cnn, tiny_vit
from tests.tiny_models import tiny_hybrid

MODELS = {"cnn": tiny_cnn, "vit": tiny_vit, "hybrid": tiny_hybrid}
ONE_GPU = TensorrtOptions(library="tensorrt_rtx", capabilities=("SM89",))
FILES = tempfile.TemporaryDirectory()  # gone when the process ends
EXACT = dataclasses.replace(ONE_GPU, floats="float32")


@pytest.fixture(autouse=True)
def _rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


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
        row = compare("compressed", title, batch, logits, reference, "random")
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


def test_fp16_baseline(tmp_path: Path) -> None:
    path = tmp_path / "fp16.engine"
    done = export_fp16_baseline(float_source("vit"), path, ONE_GPU)
    assert done.precision == "fp16"
    assert set(done.layers) == {"float16"}
    reader = TensorrtExporter(ONE_GPU).reader(path)
    assert reader is not None
    assert sqnr_db(model_of("vit").graph_module(images()), reader[1](images())) > 50
    with pytest.raises(UsageError, match="wanted the float graph"):
        export_fp16_baseline(source_of(quantized("vit", 8, 8), "w8a8"), path)


def test_float32_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "fp32.engine"
    done = TensorrtExporter(EXACT).export(float_source("cnn"), path)
    assert done.precision == "fp32" and set(done.layers) == {"float32"}
    types = {tensor.data_type for tensor in onnx.load(companion(path)).graph.initializer}
    assert TensorProto.FLOAT16 not in types


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


@pytest.mark.parametrize("bits", [None, 8])
def test_two_of_four_zeros_are_found(bits: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruned, _ = sparsify_2_4(Sparse())
    model: Any = captured(pruned)
    if bits:
        options = QuantizeOptions(bits, bits, equalize=False)
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


class OneQuantizer(nn.Module):
    def __init__(self, zero_point: int, bits: int) -> None:
        super().__init__()
        self.zero_point, self.bits = zero_point, bits

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.deploykit.fake_quantize(x, 0.125, self.zero_point, self.bits)
        return x.flatten(2).mean(-1)


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
    assert any("for SM89, SM120" in note for note in done.notes) or not _tensorrt.gpu_missing()
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


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────


def test_truncated_onnx_is_one_line(tmp_path: Path) -> None:
    whole = float_source("cnn")
    assert whole.onnx is not None
    file = tmp_path / "model.onnx"
    file.write_bytes(whole.onnx.read_bytes()[:-1000])
    source = dataclasses.replace(whole, onnx=file)
    with pytest.raises(DeploykitError, match="can't be read as an ONNX file") as error:
        TensorrtExporter(ONE_GPU).export(source, tmp_path / "model.engine")
    assert "\n" not in str(error.value)


def request(tmp_path: Path, **changes: Any) -> Any:
    values = tensorrt_build.Request(
        library="tensorrt_rtx",
        onnx=str(float_source("cnn").onnx),
        engine=str(tmp_path / "model.engine"),
        input_name="image",
        batch=[1, 2, 4],
        input_shape=[3, 32, 32],
        capabilities=["SM89"],
        workspace_mib=0,
        optimization_level=3,
        sparse=False,
        fp8=False,
        timing_cache="",
    )
    return {**values, **changes}


def test_builder_refuses_a_broken_file_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.onnx"
    file.write_bytes(b"\x08\x09 not an onnx file")
    with pytest.raises(DeploykitError, match="can't read the network") as error:
        ask_builder(request(tmp_path, onnx=str(file)), 60)
    assert "\n" not in str(error.value)


def test_builder_refuses_unsigned_codes(tmp_path: Path) -> None:
    """The reason for the dialect: should a version ever take them, the dialect can go."""
    with pytest.raises(DeploykitError, match="zero point"):
        ask_builder(request(tmp_path, onnx=str(quantized_source("cnn", 8, 8).onnx)), 60)


def test_unknown_capability(tmp_path: Path) -> None:
    options = dataclasses.replace(ONE_GPU, capabilities=("SM12345",))
    with pytest.raises(UsageError, match=r"unknown compute capability 'SM12345'.*SM89"):
        TensorrtExporter(options).export(float_source("cnn"), tmp_path / "model.engine")


def test_slow_build_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"took more than 0.01 s"):
        ask_builder(request(tmp_path), 0.01)


def test_a_builder_that_dies_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploykit.export import tensorrt

    command = (sys.executable, "-c", "import sys; sys.exit('out of luck')")
    monkeypatch.setattr(tensorrt, "_BUILDER", command)
    with pytest.raises(DeploykitError, match=r"builder died \(exit code 1\): out of luck"):
        ask_builder(request(tmp_path), 60)


@pytest.mark.parametrize(
    "wrong", [{"batch": (0, 1, 2)}, {"batch": (4, 2, 8)}, {"optimization_level": 6},
              {"workspace_mib": 0}],
)  # fmt: skip
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="wanted"):
        TensorrtOptions(**wrong)


def test_reader_wants_the_engine_s_own_onnx(tmp_path: Path) -> None:
    path, exporter = tmp_path / "model.engine", TensorrtExporter(EXACT)
    with pytest.raises(UsageError, match="can't be read"):
        exporter.reader(path)
    exporter.export(float_source("cnn"), path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UsageError, match="belongs to another engine"):
        exporter.reader(path)


def test_missing_libraries_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tensorrt, "LIBRARIES", ("no_such_library",))
    reason = TensorrtExporter().available()
    assert reason is not None and "deploykit-vision[tensorrt-rtx]" in reason
    with pytest.raises(TargetMissingError):
        _tensorrt.find_libraries()


# ── the full library, by a stand-in: RTX under its name, without compute capabilities ─────────


class FullLibrary:
    __name__ = "tensorrt"

    def __getattr__(self, name: str) -> Any:
        import tensorrt_rtx

        if name == "ComputeCapability":
            raise AttributeError(name)
        return getattr(tensorrt_rtx, name)


@pytest.fixture
def full_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "find_libraries", lambda _: [FullLibrary()])


def test_full_library_wants_a_gpu(full_library: None, tmp_path: Path) -> None:
    if _tensorrt.gpu_missing() is None:
        pytest.skip("a GPU is here")
    with pytest.raises(TargetMissingError, match=r"builds on the GPU .* no NVIDIA driver"):
        tensorrt_build.build(request(tmp_path, capabilities=[]))
    with pytest.raises(UsageError, match="for the GPU at hand only"):
        tensorrt_build.build(request(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_full_library_keeps_a_timing_cache(
    full_library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_build, "gpu_missing", lambda: None)
    cache = tmp_path / "timing.cache"
    asked = request(tmp_path, capabilities=[], timing_cache=str(cache))
    answer = tensorrt_build.build(asked)
    first = cache.read_bytes()
    assert first and answer["capabilities"] == [] and not answer["cache_refused"]
    assert answer["layers"] == {"float32": 5}
    cache.write_bytes(b"another version's cache")
    tensorrt_build.build(asked)
    assert cache.read_bytes() == first
    assert {one.name for one in tmp_path.iterdir()} == {"timing.cache", "model.engine"}
    link = tmp_path / "link.cache"
    link.symlink_to(cache)
    with pytest.raises(UsageError, match="not a link or folder"):
        tensorrt_build.build({**asked, "timing_cache": str(link)})


def test_rtx_says_that_it_keeps_no_cache(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    options = dataclasses.replace(EXACT, timing_cache=cache)
    done = TensorrtExporter(options).export(float_source("cnn"), tmp_path / "m.engine")
    assert any("no timing cache" in note for note in done.notes) and not cache.exists()


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
