"""ONNX files compute what their graphs compute."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from deploykit.errors import DeploykitError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.onnx_exporters import INPUT_NAME, OUTPUT_NAME
from deploykit.graph.capture import CapturedModel
from deploykit.graph.ops import (
    dequantize,
    fake_quantize,
    fake_quantize_log,
    fake_quantize_twin,
)
from deploykit.graph.quantized import FLOAT, QuantizedModel
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.runtimes import import_onnxruntime
from deploykit.targets.cpu_onnxruntime import CpuOnnxRuntime
from deploykit.targets.cpu_openvino import CpuOpenvino
from tests.graphs import (
    SIZE,
    batches,
    captured,
    images,
    make_backbone,
    nodes_of,
    shake,
    tiny_cnn,
    tiny_vit,
)

MODELS = {"cnn": tiny_cnn, "vit": tiny_vit}
WIDTHS = [(8, 8), (4, 8), (4, 4), (4, FLOAT)]
Run = Callable[[Tensor], Tensor]
few = settings(max_examples=40, deadline=None)


def plain_session(data: bytes) -> Run:
    """ONNX Runtime doing operator by operator what the file says."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run([OUTPUT_NAME], {INPUT_NAME: x.numpy()})[0])


def runner(target: Any, path: Path) -> Run:
    loaded = target.load(path, 1)
    return lambda x: torch.from_numpy(loaded(x.numpy()))


@cache
def model_of(name: str) -> CapturedModel:
    return captured(MODELS[name]())


@cache
def quantized(name: str, weights: int, inputs: int) -> QuantizedModel:
    return quantize(model_of(name), QuantizeOptions(weights, inputs), batches(count=16))


@cache
def float_file(name: str) -> bytes:
    model = model_of(name)
    return onnx_bytes(model.graph_module, model.backbone)


@cache
def quantized_file(name: str, weights: int, inputs: int) -> bytes:
    model = quantized(name, weights, inputs)
    metadata = {"bits": model.bits, "a": "first"}
    return onnx_bytes(model.graph_module, model.backbone, metadata=metadata)


def initializers(data: bytes) -> dict[str, Any]:
    return {t.name: t for t in onnx.load_from_string(data).graph.initializer}


# ── single operators ──────────────────────────────────────────────────────────────────────────

SIDE = 4


class Op(nn.Module):
    """One operator on the image."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def lowered(module: nn.Module) -> tuple[Run, Run, bytes]:
    """The module in torch and its file in ONNX Runtime."""
    model = captured(module, SIDE)
    data = onnx_bytes(model.graph_module, model.backbone)
    return model.graph_module, plain_session(data), data


def as_images(values: list[float] | np.ndarray) -> Tensor:
    flat = torch.as_tensor(np.asarray(values, np.float32))
    count = -(-len(flat) // (3 * SIDE * SIDE))
    padded = torch.zeros(count * 3 * SIDE * SIDE)
    padded[: len(flat)] = flat
    return padded.reshape(count, 3, SIDE, SIDE)


def around(points: np.ndarray) -> np.ndarray:
    points = points.astype(np.float32)
    return np.concatenate([points, np.nextafter(points, np.inf), np.nextafter(points, -np.inf)])


@cache
def lowered_fake_quantize(scale: float, zero_point: int, bits: int) -> tuple[Run, Run, bytes]:
    return lowered(Op(lambda x: fake_quantize(x, scale, zero_point, bits)))


GRIDS = [
    (float(np.float32(0.1)), 128, 8),
    (0.25, 0, 8),
    (float(np.float32(1e-8)), 7, 6),
    (float(np.float32(0.037)), 11, 4),
    (float(np.float32(1.7)), 0, 3),
]


@pytest.mark.parametrize(("scale", "zero_point", "bits"), GRIDS)
@given(values=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=20))
@few
def test_fake_quantize_gives_the_same_codes(
    scale: float, zero_point: int, bits: int, values: list[float]
) -> None:
    graph, session, _ = lowered_fake_quantize(scale, zero_point, bits)
    steps = np.arange(-3, 2**bits + 3) - zero_point
    ties = around((steps + 0.5) * np.float32(scale))
    x = as_images(np.concatenate([values, np.array(values) * scale, ties, steps * scale]))
    wanted, result = graph(x), session(x)
    codes, theirs = (torch.round(y / scale) for y in (wanted, result))
    assert torch.equal(codes, theirs)
    assert torch.equal(wanted, result)


@pytest.mark.parametrize(("scale", "bits"), [(1.0, 4), (float(np.float32(0.83)), 3), (0.5, 8)])
@given(values=st.lists(st.floats(0, 2.0**20, width=32), max_size=20))
@few
def test_log_gives_the_same_values_but_at_ties(
    scale: float, bits: int, values: list[float]
) -> None:
    graph, session, _ = lowered_log(scale, bits)
    grid = scale * 2.0 ** (-np.arange(2**bits + 2) / 2)
    x = as_images(np.concatenate([values, grid, grid * 1.05, grid * 0.95, [0.0, 1e-38, -1.0]]))
    wanted, result = graph(x), session(x)
    position = -2 * torch.log2(x.double() / scale)
    tie = ((position - position.floor()) - 0.5).abs() < 1e-4
    assert torch.equal(wanted[~tie], result[~tie])
    if tie.any():  # one code up or down
        ratio = (wanted[tie] / result[tie]).nan_to_num(1.0)
        assert ((ratio > 0.7) & (ratio < 1.42) | (result[tie] == 0) | (wanted[tie] == 0)).all()
    assert (session(torch.zeros(1, 3, SIDE, SIDE)) == 0).all()


@cache
def lowered_log(scale: float, bits: int) -> tuple[Run, Run, bytes]:
    values = np.float32(scale) * np.exp2(-np.arange(2**bits, dtype=np.float32) / 2)
    values[-1] = 0
    offset = float(np.float32(2 * np.log2(scale)))
    table = values.tolist()
    return lowered(Op(lambda x: fake_quantize_log(x, 0.0, 2.0, offset, table, 0.0, 0)))


class Attention(nn.Module):
    """A product of quantised softmax outputs, as attention has it."""

    def __init__(self, values: list[float], step: float, zero_point: int, twin: bool) -> None:
        super().__init__()
        self.table, self.twin = (values, step, zero_point), twin

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x * 4, -1)
        if self.twin:
            weights = fake_quantize_twin(weights, 0.25, 0.125, 0.75, *self.table)
        else:
            weights = fake_quantize_log(weights, 0.0, 1.0, 0.0, *self.table)
        return weights @ fake_quantize(x.transpose(2, 3), 0.03125, 100, 8)


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize(("zero_point", "low"), [(0, 0.0), (51, -0.25)])
@pytest.mark.parametrize("on_bytes", [True, False])
def test_a_table_of_bytes_is_multiplied_as_integers(
    tmp_path: Path, on_bytes: bool, zero_point: int, low: float, twin: bool
) -> None:
    step = float(np.float32((1 - low) / 255))
    codes = np.array([255, 128, 77, 0], np.float32)
    values = ((codes - zero_point) * np.float32(step)).tolist()
    if twin:
        values.reverse()
    grid = (step, zero_point) if on_bytes else (0.0, 0)
    graph, session, data = lowered(Attention(values, *grid, twin))
    (tmp_path / "m.onnx").write_bytes(data)
    x = images(5, SIDE, seed=2)
    fast = runner(CpuOnnxRuntime(), tmp_path / "m.onnx")
    for run in (session, fast):
        assert sqnr_db(graph(x), run(x)) > 100
    operators = optimised_operators(data, tmp_path)
    assert operators["MatMulIntegerToFloat"] == (1 if on_bytes else 0)
    assert operators["MatMul"] == (0 if on_bytes else 1)
    graph_proto = onnx.load_from_string(data).graph
    constants = [a.t for n in graph_proto.node for a in n.attribute if a.name == "value"]
    tables = [t for t in [*graph_proto.initializer, *constants] if list(t.dims) == [4]]
    assert {t.data_type for t in tables} == {TensorProto.UINT8 if on_bytes else TensorProto.FLOAT}


def test_a_model_says_how_its_tables_run() -> None:
    options = QuantizeOptions(4, 4, softmax="log-sqrt2")
    model = quantize(model_of("vit"), options, batches())
    table = "codes of 2 activations without equal steps"
    split = model.how_it_runs()
    assert "4 attention matmuls have integer inputs" in split["integer"]
    assert f"{table} become 8-bit integers by a table" in split["wider"]
    assert not split["simulated"]
    module = copy.deepcopy(model.graph_module)
    for node in nodes_of(module, torch.ops.deploykit.fake_quantize_log.default):
        node.args = (*node.args[:5], 0.0, 0)
    split = dataclasses.replace(model, graph_module=module).how_it_runs()
    assert "2 attention matmuls have integer inputs" in split["integer"]
    assert split["simulated"] == [f"{table}: their values are multiplied as floats"]
    assert not any("table" in line for line in split["wider"])


def optimised_operators(data: bytes, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file."""
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    model = onnx.load(folder / "optimised.onnx")
    return Counter(node.op_type for node in model.graph.node)


class Dequantized(nn.Module):
    """Adds dequantised codes to the image."""

    def __init__(self, bits: int, axis: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(bits)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        kind = torch.int32 if bits == 32 else torch.int8
        shape = (3, SIDE, SIDE)
        self.register_buffer("codes", torch.randint(low, high, shape, generator=generator).to(kind))
        scale = torch.rand(shape[axis], generator=generator) + 0.01
        self.register_buffer("scale", scale)
        self.bits, self.axis = bits, axis

    def forward(self, x: Tensor) -> Tensor:
        return x + dequantize(self.codes, self.scale, self.axis, self.bits)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("bits", "kind"),
    [(32, "INT32"), (8, "INT8"), (5, "INT8"), (4, "INT4"), (2, "INT4")],
)
def test_dequantize_is_exact_and_stored_narrow(bits: int, kind: str, axis: int) -> None:
    module = Dequantized(bits, axis)
    graph, session, data = lowered(module)
    x = images(3, SIDE)
    assert torch.equal(graph(x), session(x))
    stored = [t for t in initializers(data).values() if list(t.dims) == [3, SIDE, SIDE]]
    assert [TensorProto.DataType.Name(t.data_type) for t in stored] == [kind]
    np.testing.assert_array_equal(
        numpy_helper.to_array(stored[0]).astype(np.int64), module.codes.numpy()
    )


class Layer(nn.Module):
    """A layer with quantised inputs and weights, as insertion writes it."""

    def __init__(self, linear: bool, bits: int) -> None:
        super().__init__()
        self.linear, self.bits = linear, bits
        shape = (12, 5) if linear else (5, 3, 3, 3)
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator)
        self.register_buffer("codes", codes.to(torch.int8))
        self.register_buffer("scale", torch.rand(5, generator=generator) * 0.1 + 0.01)

    def forward(self, x: Tensor) -> Tensor:
        x = fake_quantize(x, 0.03125, 100, 8)
        weight = dequantize(self.codes, self.scale, 1 if self.linear else 0, self.bits)
        if self.linear:
            return x.flatten(2).transpose(1, 2).flatten(2).reshape(x.shape[0], 4, 12) @ weight
        return torch.conv2d(x, weight, None, [1, 1], [1, 1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("linear", [True, False])
def test_quantised_layers_agree_to_round_off(tmp_path: Path, linear: bool, bits: int) -> None:
    graph, session, data = lowered(Layer(linear, bits))
    (tmp_path / "m.onnx").write_bytes(data)
    optimised = runner(CpuOnnxRuntime(), tmp_path / "m.onnx")
    for count in (1, 2, 5):
        x = images(count, SIDE)
        assert sqnr_db(graph(x), session(x)) > 110
        assert sqnr_db(graph(x), optimised(x)) > 110


class GroupNorms(nn.Module):
    def __init__(self, groups: int, channels: int, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-3, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).flatten(2).sum(2)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("groups", "channels"), [(1, 6), (2, 6), (6, 6), (1, 1)])
def test_group_norm(groups: int, channels: int, affine: bool) -> None:
    module = shake(GroupNorms(groups, channels, affine)).eval()
    graph, session, data = lowered(module)
    operators = {node.op_type for node in onnx.load_from_string(data).graph.node}
    assert "GroupNormalization" not in operators and "Shape" not in operators
    for count in (1, 2, 5):
        x = images(count, SIDE) * 3 + 1
        torch.testing.assert_close(graph(x), session(x), rtol=1e-4, atol=1e-4)


class Ranked(nn.Module):
    """Pixels in the order of their first channel's tenths, of which many are equal."""

    def __init__(self, descending: bool) -> None:
        super().__init__()
        self.descending = descending

    def forward(self, x: Tensor) -> Tensor:
        keys = (x[:, 0].flatten(1) * 3).round()
        order = keys.argsort(dim=1, descending=self.descending, stable=True)
        return x[:, 1].flatten(1).gather(1, order)


@pytest.mark.parametrize("descending", [False, True])
def test_a_stable_sort_keeps_the_order_of_equals(descending: bool) -> None:
    graph, session, _ = lowered(Ranked(descending))
    for count in (1, 2, 5):
        x = images(count, SIDE)
        assert torch.equal(graph(x), session(x))


class Quotients(nn.Module):
    """Divisors that are zero at times: an epsilon added, put first, or taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).relu()
        return y / (y + 1e-8) + y / (1e-9 + y) + (y - 1e-8).sign()


def test_an_epsilon_of_a_divisor_is_not_optimised_away() -> None:
    graph, session, _ = lowered(shake(Quotients()).eval())
    for count in (1, 2, 5):
        x = images(count, SIDE)
        assert torch.isfinite(session(x)).all()
        torch.testing.assert_close(graph(x), session(x))


# ── whole models ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_float_files_equal_their_graphs(tmp_path: Path, name: str) -> None:
    model, data = model_of(name), float_file(name)
    (tmp_path / "m.onnx").write_bytes(data)
    runs = [plain_session(data), runner(CpuOnnxRuntime(), tmp_path / "m.onnx")]
    for count in (1, 2, 5):
        x = images(count, seed=3)
        for run in runs:
            assert sqnr_db(model.graph_module(x), run(x)) > 100
    operators = {node.op_type for node in onnx.load_from_string(data).graph.node}
    assert "QuantizeLinear" not in operators


def noise_is_the_quantisers(model: QuantizedModel, name: str, x: Tensor, result: Tensor) -> None:
    """Codes flip where a value lies between two, so equality isn't to be had; see parity.py."""
    wanted, exact = model(x), model_of(name).graph_module(x)
    own = sqnr_db(exact, wanted)
    assert sqnr_db(wanted, result) > own - 3
    assert sqnr_db(exact, result) > own - 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights", "inputs"), WIDTHS)
def test_quantised_files_compute_their_simulation(
    tmp_path: Path, name: str, weights: int, inputs: int
) -> None:
    model, data = quantized(name, weights, inputs), quantized_file(name, weights, inputs)
    (tmp_path / "m.onnx").write_bytes(data)
    plain, fast = plain_session(data), runner(CpuOnnxRuntime(), tmp_path / "m.onnx")
    for count in (1, 2, 5):
        x = images(count, seed=3)
        assert plain(x).shape == (count, 10)
        if inputs == FLOAT:
            assert sqnr_db(model(x), plain(x)) > 100
            # optimised, it computes these products with 8-bit activations of its own
            assert sqnr_db(model(x), fast(x)) > 25
    x = images(24, seed=1)
    noise_is_the_quantisers(model, name, x, plain(x))
    noise_is_the_quantisers(model, name, x, fast(x))
    # one image by itself gives what it gives among others
    single = torch.cat([plain(x[i : i + 1]) for i in range(3)])
    assert sqnr_db(plain(x)[:3], single) > 20


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights", "inputs"), [(FLOAT, FLOAT), (8, 8), (4, 4)])
def test_openvino_agrees(tmp_path: Path, name: str, weights: int, inputs: int) -> None:
    target = CpuOpenvino()
    if reason := target.available():
        pytest.skip(reason)
    is_float = weights == FLOAT
    data = float_file(name) if is_float else quantized_file(name, weights, inputs)
    (tmp_path / "m.onnx").write_bytes(data)
    run = runner(target, tmp_path / "m.onnx")
    for count in (1, 2, 5):
        assert run(images(count)).shape == (count, 10)
    x = images(24, seed=1)
    if is_float:
        assert sqnr_db(model_of(name).graph_module(x), run(x)) > 100
    else:
        noise_is_the_quantisers(quantized(name, weights, inputs), name, x, run(x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights", "inputs"), WIDTHS)
def test_weights_are_stored_as_integers(name: str, weights: int, inputs: int) -> None:
    model, data = quantized(name, weights, inputs), quantized_file(name, weights, inputs)
    kinds = Counter(
        TensorProto.DataType.Name(t.data_type)
        for t in initializers(data).values()
        if t.name.split("_int4")[0].endswith("weight_codes")
    )
    plans = [plan for plan in model.plans if plan.weight_bits not in (None, FLOAT)]
    narrow = sum(plan.weight_bits <= 4 for plan in plans)
    assert kinds == Counter({"INT4": narrow, "INT8": len(plans) - narrow}) - Counter()
    embeddings = {(1, 16 + 1, 32), (1, 1, 32)}
    for tensor in initializers(data).values():
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            assert tuple(tensor.dims) in embeddings or values.size <= max(tensor.dims), tensor.name
    if name == "cnn" and inputs != FLOAT:
        biases = [t for t in initializers(data).values() if t.name.endswith("bias_codes")]
        assert len(biases) == 5 and all(t.data_type == TensorProto.INT32 for t in biases)


def test_four_bit_codes_survive_packing() -> None:
    model, data = quantized("vit", 4, 4), quantized_file("vit", 4, 4)
    stored = initializers(data)
    packed = 0
    for node in nodes_of(model.graph_module, torch.ops.deploykit.dequantize.default):
        name = str(node.args[0].target)
        codes = model.graph_module.get_buffer(name).numpy()
        key = f"{name}_int4" if node.args[3] <= 4 else name
        np.testing.assert_array_equal(numpy_helper.to_array(stored[key]).astype(np.int64), codes)
        packed += node.args[3] <= 4
    assert packed == 8


def test_files_shrink_as_their_weights_do() -> None:
    payload = {
        key: sum(numpy_helper.to_array(t).nbytes for t in initializers(data).values())
        for key, data in {"float": float_file("vit")}.items()
    }["float"]
    sizes = {
        widths: sum(
            len(t.raw_data) or numpy_helper.to_array(t).nbytes
            for t in initializers(quantized_file("vit", *widths)).values()
        )
        for widths in WIDTHS
    }
    assert sizes[8, 8] < 0.36 * payload
    assert sizes[4, 4] < 0.27 * payload
    assert sizes[4, 8] < sizes[8, 8]
    assert len(quantized_file("vit", 4, 8)) < len(quantized_file("vit", 8, 8))
    assert len(quantized_file("vit", 8, 8)) < len(float_file("vit"))


def test_the_file_says_what_it_is() -> None:
    proto = onnx.load_from_string(quantized_file("cnn", 4, 4))
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 21)]
    assert {p.key: p.value for p in proto.metadata_props} == {"a": "first", "bits": "w4a4"}
    (image,), (logits,) = proto.graph.input, proto.graph.output
    assert (image.name, logits.name) == (INPUT_NAME, OUTPUT_NAME)
    dims = image.type.tensor_type.shape.dim
    assert dims[0].dim_param and [d.dim_value for d in dims[1:]] == [3, SIZE, SIZE]
    assert not proto.functions
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)
    assert not any(t.external_data for t in proto.graph.initializer)
    assert str(Path.home()) not in quantized_file("cnn", 4, 4).decode("latin-1")
    assert b"/work" not in quantized_file("cnn", 4, 4)


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    model = quantize(model_of("cnn"), QuantizeOptions(4, 4), batches(count=16))
    metadata = {"a": "first", "bits": "w4a4"}
    data = onnx_bytes(model.graph_module, model.backbone, metadata=metadata)
    (tmp_path / "m.onnx").write_bytes(data)
    assert (tmp_path / "m.onnx").read_bytes() == quantized_file("cnn", 4, 4)


def test_a_fixed_batch_is_exported_with_it() -> None:
    model = model_of("cnn")
    data = onnx_bytes(model.graph_module, model.backbone, dynamic_batch=False)
    assert onnx.load_from_string(data).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    x = images(1)
    assert sqnr_db(model.graph_module(x), plain_session(data)(x)) > 100


class Twins(nn.Module):
    """One convolution applied twice, and another of equal weights: their codes are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.b(self.a(self.a(x).relu()).relu()).relu().mean((2, 3)))


def test_equal_weights_may_share_their_codes() -> None:
    module = shake(Twins())
    module.b.load_state_dict(module.a.state_dict())
    model = captured(module.eval())
    result = quantize(model, QuantizeOptions(4, 8), batches())
    data = onnx_bytes(result.graph_module, result.backbone)
    x = images(8, seed=1)
    assert sqnr_db(result(x), plain_session(data)(x)) > 35


def test_what_cannot_be_exported_is_said_in_one_line() -> None:
    class Boolean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(x[:, 0]).abs()

    model = captured(Boolean().eval(), SIDE)
    with pytest.raises(DeploykitError, match="tiny can't be exported to ONNX") as caught:
        onnx_bytes(model.graph_module, make_backbone(nn.Identity(), SIDE))
    said = str(caught.value)
    assert "linalg_eig" in said and "\n" not in said and "\x1b" not in said
