"""Profiles of small files in two runtimes, and each piece that makes them on made-up cases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploykit.errors import ExitCode, MeasurementError, TargetMissingError, UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.onnx_names import name_layers
from deploykit.layer_profile import UNMAPPED, layer_costs, layer_profile
from deploykit.quant.plan import plan_layers
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.targets.profiling import openvino as openvino_reader
from deploykit.targets.profiling import profile, worker
from deploykit.targets.profiling.kernels import Kernel, get_reader, profiled_targets
from deploykit.targets.profiling.onnxruntime import kernels_of_events, onnx_source
from deploykit.targets.profiling.ownership import SourceGraph, SourceNode, owners, plain_layer
from deploykit.targets.profiling.profile import FileProfile, profile_files
from deploykit.targets.profiling.tensorrt import TensorrtReader, engine_source, kernels_of_engine
from deploykit.targets.registry import list_targets
from tests.graphs import SIZE, batches, captured, tiny_cnn, tiny_vit

SHAPE = (3, SIZE, SIZE)
LAYERS = ["stem", "depthwise", "narrow", "wide", "head"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A float file and the 8-bit file of the same network."""
    folder = tmp_path_factory.mktemp("files")
    model = captured(tiny_cnn())
    narrow = quantize(model, QuantizeOptions(8, 8), batches())
    paths = [folder / "float.onnx", folder / "int8.onnx"]
    for path, graph_module in zip(paths, (model.graph_module, narrow.graph_module), strict=True):
        path.write_bytes(onnx_bytes(graph_module, model.backbone))
    return paths


@pytest.mark.parametrize("target", ["cpu-onnxruntime", "cpu-openvino"])
def test_a_real_profile_accounts_for_all_time_and_every_layer(
    target: str, files: list[Path]
) -> None:
    if target == "cpu-openvino":
        pytest.importorskip("openvino")
    found = profile_files(target, files, input_shape=SHAPE, seconds=0.02, rounds=2)
    assert [one.path for one in found] == files
    for one in found:
        rounds = zip(*(kernel.ms for kernel in one.kernels), strict=True)
        assert [sum(times) for times in rounds] == pytest.approx(one.total_ms)
        kept = layer_profile("x", "onnx", target, one)
        assert sum(row.ms for row in kept.layers) == pytest.approx(kept.total_ms)
        assert sum(row.share for row in kept.layers) == pytest.approx(1)
        assert set(layer_costs(kept)) == set(LAYERS)
        assert sorted(k.layer for k in one.kernels if k.kind == "compute") == sorted(LAYERS)
    floats, narrow = ({k.layer: k for k in x.kernels if k.kind == "compute"} for x in found)
    assert {kernel.precision for kernel in floats.values()} == {"float32"}
    assert {narrow[name].precision for name in LAYERS[:-1]} == {"int8"}
    assert not [k for k in found[0].kernels if k.kind == "quantise"]
    assert [k for k in found[1].kernels if k.kind == "quantise"]


@pytest.mark.parametrize("bits", [16, 4])
def test_files_name_their_layers_as_plans_do(bits: int, tmp_path: Path) -> None:
    model = captured(tiny_vit())
    graph_module = model.graph_module
    if bits < 16:
        graph_module = quantize(model, QuantizeOptions(bits, bits), batches()).graph_module
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_bytes(graph_module, model.backbone))
    planned = [plan.layer for plan in plan_layers(model.graph_module, 8, 8)]
    assert "blocks.0.attn.attention_value" in planned
    assert onnx_source(path).layers == planned


def test_a_file_whose_nodes_are_not_the_layers_keeps_its_names(files: list[Path]) -> None:
    model = ir.from_proto(onnx.load(str(files[0])))
    before = [node.name for node in model.graph]
    assert not name_layers(model, captured(tiny_vit()).graph_module)
    assert [node.name for node in model.graph] == before


def graph(*nodes: tuple[str, str, tuple[str, ...], tuple[str, ...]]) -> SourceGraph:
    return SourceGraph([SourceNode(*node) for node in nodes])


SMALL = graph(
    ("quantize", "", (), ("codes",)),
    ("first", "first", ("quantize",), ("a",)),
    ("norm", "", ("first",), ("b",)),
    ("relu", "", ("norm",), ("c",)),
    ("second", "second", ("relu",), ("d",)),
    ("sum", "", ("second", "relu"), ("e",)),
    ("mean", "", ("sum",), ("f",)),
)


@pytest.mark.parametrize(
    ("kernels", "wanted"),
    [
        ([("first", (), True), ("second", (), True)], ["first", "second"]),
        ([("c_nchwc", ("c",), True), ("e_nchwc", ("e",), True)], ["first", "second"]),
        ([("made up", (), True), ("second", (), True)], ["first", "second"]),
        ([("x", (), True), ("y", (), True)], ["first", "second"]),
        ([("x", (), True), ("y", (), True), ("z", (), True)], ["", "", ""]),
        ([("all", (), True)], [""]),
        ([("quantize", (), False), ("first", (), True)], ["first", "first"]),
        ([("relu", (), False), ("first", (), True)], ["second", "first"]),
        ([("reorder", (), False), ("second", (), True)], ["second", "second"]),
        ([("second", (), True), ("mean", (), False), ("cast", (), False)], ["second"] * 3),
        ([("cast", (), False)], [""]),
    ],
)
def test_every_kernel_finds_its_layer(
    kernels: list[tuple[str, tuple[str, ...], bool]], wanted: list[str]
) -> None:
    assert owners(SMALL, kernels) == wanted


def test_the_second_operator_of_a_layer_is_the_layer() -> None:
    assert plain_layer("blocks.0.fc#2") == "blocks.0.fc"
    assert plain_layer("odd#name") == "odd#name"


def event(name: str, op: str, ms: float, index: int, kind: str, start: float) -> dict[str, Any]:
    args = {"op_name": op, "node_index": str(index), "input_type_shape": [{kind: [1]}]}
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "dur": ms * 1e3,
        "ts": start,
        "args": args,
    }


def test_events_become_kernels_in_the_order_of_running() -> None:
    events = []
    for call, factor in enumerate((100, 1, 3, 2)):  # the first call allocates
        events += [
            event("q", "QuantizeLinear", 1 * factor, 0, "float", 10 * call),
            event("q", "QuantizeLinear", 5 * factor, 1, "float", 10 * call + 1),
            event("conv", "QLinearConv", 2 * factor, 2, "uint8", 10 * call + 2),
            {"cat": "Session", "name": "model_run", "dur": 9, "ts": 10 * call},
        ]
    found = kernels_of_events(list(reversed(events)))
    assert [(k.name, k.kind, k.precision, k.ms) for k in found] == [
        ("q", "quantise", "float32", 2),
        ("q", "quantise", "float32", 10),
        ("conv", "compute", "int8", 4),
    ]


@pytest.mark.parametrize(
    ("exec_type", "precision"),
    [("brgemm_avx512_I8", "int8"), ("jit_avx512_f32", "float32"), ("brgconv_amx_bf16", "bfloat16")],
)
def test_openvino_says_what_it_computed_with(exec_type: str, precision: str) -> None:
    assert openvino_reader.kernel_precision(exec_type) == precision


@pytest.mark.parametrize(
    ("node_type", "name", "kind"),
    [
        ("FullyConnectedQuantizedLegacy", "head/DequantizationMultiply", "compute"),
        ("MulAdd", "head/DequantizationMultiply", "quantise"),
        ("FakeQuantize", "q", "quantise"),
        ("Reorder", "a_abcd_acdb_b", "reformat"),
        ("Gelu", "act", "other"),
    ],
)
def test_openvino_nodes_are_of_a_kind(node_type: str, name: str, kind: str) -> None:
    info = SimpleNamespace(node_type=node_type, node_name=name)
    assert openvino_reader.kernel_kind(info) == kind


ENGINE = {
    "Layers": [
        {"Name": "Reformatting CopyNode for Input Tensor 0 to stem + relu", "LayerType": "Reformat",
         "Inputs": [{"Format/Datatype": "Row major linear FP32"}]},
        {"Name": "stem + relu", "LayerType": "CaskConvolution",
         "Inputs": [{"Format/Datatype": "Four wide channel vectorized row major Int8 format"}]},
        {"Name": "fc1", "LayerType": "MatrixMultiply",
         "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
        {"Name": "act", "LayerType": "PointWise",
         "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}]},
    ]
}  # fmt: skip
"""In the shape of the inspector's JSON (TensorRT's developer guide, engine inspector)."""


def test_an_engine_s_layers_and_times_become_kernels() -> None:
    times = {layer["Name"]: [0.1, 0.4, 0.2] for layer in ENGINE["Layers"]}
    found = kernels_of_engine(ENGINE, times)
    assert [(k.kind, k.precision, k.ms) for k in found] == [
        ("reformat", "float32", 0.2),
        ("compute", "int8", 0.2),
        ("compute", "float16", 0.2),
        ("other", "float16", 0.2),
    ]
    reader = TensorrtReader()
    kernels = [(k.name, reader.undecorated(k.name), k.kind == "compute") for k in found]
    assert owners(engine_source(ENGINE), kernels) == ["stem", "stem", "fc1", "fc1"]
    unnamed = kernels_of_engine({"Layers": ["a name"]}, {"a name": [1.0]})
    assert [(k.op, k.precision) for k in unnamed] == [("unknown", "")]


def test_rounds_are_scaled_each_to_its_own_calls_and_nothing_is_dropped(
    files: list[Path],
) -> None:
    def kernel(key: str, ms: float) -> Kernel:
        return Kernel(key, key, "Conv", "compute", "float32", ms)

    rounds = [[kernel("stem", 1.0), kernel("odd", 3.0)], [kernel("stem", 5.0)]]
    reader = get_reader("cpu-onnxruntime")
    rows = worker._merged(files[0], reader, [8.0, 20.0], rounds)
    assert [(row["layer"], row["ms"]) for row in rows] == [("stem", [2, 20]), ("", [6, 0])]
    times = [profile.KernelTime(**{**row, "ms": tuple(row["ms"])}) for row in rows]
    kept = layer_profile("x", "onnx", "t", FileProfile(files[0], (8.0, 20.0), tuple(times)))
    assert sum(row.ms for row in kept.layers) == pytest.approx(14)
    assert set(layer_costs(kept)) == {"stem", UNMAPPED}
    with pytest.raises(MeasurementError, match="no time"):
        worker._merged(files[0], reader, [8.0], [[kernel("stem", 0.0)]])


def test_what_cannot_be_profiled_is_refused_in_one_line(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(TargetMissingError, match="no profiler of mobile-ncnn") as caught:
        profile_files("mobile-ncnn", files, input_shape=SHAPE)
    assert caught.value.exit_code == ExitCode.TARGET_MISSING
    assert set(profiled_targets()) <= set(list_targets())
    with pytest.raises(UsageError, match="no such file"):
        profile_files("cpu-onnxruntime", [tmp_path / "none.onnx"], input_shape=SHAPE)
    other = tmp_path / "model.xml"
    other.write_text("")
    with pytest.raises(UsageError, match=r"loads \.onnx files"):
        profile_files("cpu-onnxruntime", [other], input_shape=SHAPE)
    with pytest.raises(UsageError, match="4096 threads"):
        profile_files("cpu-onnxruntime", files, input_shape=SHAPE, threads=4096)
    with pytest.raises(UsageError, match="1 or more"):
        profile_files("cpu-onnxruntime", files, input_shape=SHAPE, batch=0)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(np.arange(100, dtype=np.uint8).tobytes())
    with pytest.raises(UsageError, match=r"broken\.onnx"):
        profile_files("cpu-onnxruntime", [broken], input_shape=SHAPE)
