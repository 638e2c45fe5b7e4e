"""Profiles of torch's targets: real ones of small graphs, and their pieces on made-up events."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.export.structure import STRUCTURE_NAME, save_model
from deploykit.layer_profile import layer_costs, layer_profile
from deploykit.optimize_for import check_target
from deploykit.profile import profile_source
from deploykit.quant.plan import plan_layers
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.targets.nvidia import gpu_missing
from deploykit.targets.profiling import torch_compiled
from deploykit.targets.profiling.kernels import Kernel, get_reader
from deploykit.targets.profiling.profile import FileProfile, profile_files
from deploykit.targets.profiling.torch_compiled import TorchCompiledReader, kernels_of_calls
from deploykit.targets.profiling.torch_events import kind_of
from deploykit.targets.profiling.torch_shapes import Product, product, products_of_graph
from deploykit.targets.torch_graph import read_graph
from tests.graphs import SIZE, batches, captured, images, tiny_vit

SHAPE = (3, SIZE, SIZE)
TORCH = ("cpu-torch", "cpu-torch-compiled", "cuda-torch")


def saved(module: nn.Module, folder: Path) -> list[Path]:
    """A float graph and the 8-bit graph of the same network."""
    model = captured(module)
    narrow: Any = quantize(model, QuantizeOptions(8, 8), batches())
    paths = [folder / "float.torch", folder / "int8.torch"]
    for path, one, bits in zip(paths, [model, narrow], ("fp32", "w8a8"), strict=True):
        path.mkdir()
        save_model(one.graph_module, model.backbone, path, precision=bits)
    return paths


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved(tiny_vit(), tmp_path_factory.mktemp("vit"))


def layers_of(path: Path) -> list[str]:
    return [node.layer for node in get_reader("cpu-torch").source(path).nodes if node.layer]


def check_profile(target: str, path: Path, found: FileProfile) -> None:
    """All time is accounted for, and every layer has its kernel."""
    rounds = zip(*(kernel.ms for kernel in found.kernels), strict=True)
    assert [sum(times) for times in rounds] == pytest.approx(found.total_ms)
    computing = [kernel for kernel in found.kernels if kernel.kind == "compute"]
    assert [kernel.layer for kernel in computing] == layers_of(path)
    assert {kernel.precision for kernel in computing} == {"float32"}
    costs = layer_costs(layer_profile("x", "torch", target, found))
    assert set(costs) == set(layers_of(path))
    assert all(cost.ms > 0 for cost in costs.values())


def test_each_node_of_an_eager_graph_is_a_kernel_of_its_layer(vit: list[Path]) -> None:
    found = profile_files("cpu-torch", vit, input_shape=SHAPE, seconds=0.02, rounds=2)
    planned = [plan.layer for plan in plan_layers(captured(tiny_vit()).graph_module, 8, 8)]
    for path, one in zip(vit, found, strict=True):
        check_profile("cpu-torch", path, one)
        assert layers_of(path) == planned
    floats, codes = ({kernel.name: kernel for kernel in one.kernels} for one in found)
    assert "conv" in floats["conv2d"].op
    assert {floats["linear"].op, floats["matmul_default"].op} == {"aten::addmm", "aten::bmm"}
    assert not [kernel for kernel in floats.values() if kernel.kind == "quantise"]
    simulated = [kernel for kernel in codes.values() if kernel.kind == "quantise"]
    nodes = read_graph(vit[1]).graph_module.graph.nodes
    assert {k.name for k in simulated} == {
        node.name for node in nodes if str(node.target).startswith("deploykit.")
    }
    assert {k.precision for k in simulated if "dequantize" in k.op} == {"int8", "int32"}


def test_a_graph_s_folder_is_profiled_and_called_a_simulation(vit: list[Path]) -> None:
    found, verdict = profile_source(vit[1], "cpu-torch", against=vit[0], seconds=0.02)
    assert [one.artifact for one in found] == ["float.torch", "int8.torch"]
    assert "simulated in floats" in verdict[-1]
    assert not [line for line in verdict if "keep these" in line or "ship the float" in line]
    (alone,), none = profile_source(vit[0] / STRUCTURE_NAME, "cpu-torch", seconds=0.02)
    assert alone.layers and not none
    with pytest.raises(UsageError, match="wanted a model file"):
        profile_source(vit[0].parent / "gone.torch", "cpu-torch")


@pytest.mark.parametrize(
    ("operator", "shapes", "wanted"),
    [
        ("aten::linear", [(2, 17, 32), (96, 32), (96,)], ("product", (1, 34, 32, 96))),
        ("aten::addmm", [(96,), (34, 32), (32, 96)], ("product", (1, 34, 32, 96))),
        ("aten::matmul", [(2, 17, 32), (32, 96)], ("product", (1, 34, 32, 96))),
        ("aten::matmul", [(2, 4, 17, 8), (2, 4, 8, 17)], ("product", (8, 17, 8, 17))),
        ("aten::bmm", [(8, 17, 8), (8, 8, 17)], ("product", (8, 17, 8, 17))),
        ("aten::baddbmm", [(1,), (8, 17, 8), (8, 8, 17)], ("product", (8, 17, 8, 17))),
        ("aten::bmm", [(1, 17, 8), (1, 8, 17)], ("product", (1, 17, 8, 17))),
        ("aten::mm", [(17, 8), (8, 17)], ("product", (1, 17, 8, 17))),
        (
            "aten::conv2d",
            [(1, 3, 32, 32), (16, 3, 3, 3)],
            ("convolution", (1, 3, 32, 32, 16, 3, 3, 3)),
        ),
        ("aten::mm", [(17, 8), ()], None),
        ("aten::mm", [(8,), (8, 17)], None),
        ("aten::einsum", [()], None),
    ],
)
def test_a_product_is_the_same_however_it_is_run(
    operator: str, shapes: list[tuple[int, ...]], wanted: Product | None
) -> None:
    assert product(operator, shapes) == wanted


def test_shapes_of_a_graph_s_products_are_those_torch_runs(vit: list[Path]) -> None:
    found = products_of_graph(read_graph(vit[0]).graph_module, images(2).numpy())
    assert found["conv2d"] == ("convolution", (2, 3, 32, 32, 32, 3, 8, 8))
    assert found["linear"] == ("product", (1, 2 * 17, 32, 96))
    assert found["matmul_default"] == ("product", (4, 17, 16, 17))
    assert found["linear_8"] == ("product", (1, 2, 32, 10))
    assert len(found) == len(layers_of(vit[0]))


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "compute"),
        ("aten::addmm", "compute"),
        ("aten::scaled_dot_product_attention", "compute"),
        ("aten::_to_copy", "reformat"),
        ("aten::t", "reformat"),
        ("aten::layer_norm", "other"),
        ("aten::add", "other"),
        ("deploykit::dequantize", "quantise"),
        ("", "other"),
    ],
)
def test_operators_are_of_a_kind(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def event(name: str, us: float, *shapes: tuple[int, ...], under: Any = None, gpu: float = 0) -> Any:
    return SimpleNamespace(
        name=name, cpu_parent=under, cpu_time_total=us, device_time_total=gpu, input_shapes=shapes,
        input_dtypes=["c10::Half" if gpu else "float"] * len(shapes),
    )  # fmt: skip


def compiled_call(scale: float = 1.0, *, gpu: float = 0) -> list[Any]:
    """A layout copy and a convolution, two equal products, then one that was fused."""
    root = event("## Call CompiledFxGraph f ##", 99.0)
    convolution = event("aten::convolution", 7 * scale, (1, 3, 8, 8), (4, 3, 2, 2), under=root)
    if gpu:
        convolution.device_time_total = gpu
    return [
        root,
        event("graph_0_cpp_fused_convolution_0", 1 * scale, under=root, gpu=gpu),
        convolution,
        event("aten::mkldnn_convolution", 6 * scale, (1, 3, 8, 8), under=convolution),
        event("aten::addmm", 5 * scale, (4,), (16, 4), (4, 4), under=root),
        event("graph_0_cpp_fused_gelu_view_1", 2 * scale, under=root, gpu=gpu),
        event("aten::mm", 4 * scale, (16, 4), (4, 4), under=root),
        event("graph_0_cpp_fused__softmax_bmm_2", 3 * scale, under=root),
    ]


NODES: dict[str, Product] = {
    "conv": ("convolution", (1, 3, 8, 8, 4, 3, 2, 2)),
    "fc1": ("product", (1, 16, 4, 4)),
    "fc2": ("product", (1, 16, 4, 4)),
}
FUSED: dict[str, Product] = {**NODES, "attention": ("product", (2, 8, 4, 8))}


def rows(found: list[Kernel]) -> list[tuple[str, str, str, str]]:
    return [(kernel.name, kernel.op, kernel.kind, kernel.precision) for kernel in found]


def test_library_calls_are_their_layers_and_fused_kernels_say_what_they_fuse() -> None:
    timed = [compiled_call(scale) for scale in (1, 9, 2)]
    found = kernels_of_calls(compiled_call(), timed, NODES, gpu=False)
    assert rows(found) == [
        ("cpp_fused_convolution_0", "fused convolution", "reformat", ""),
        ("conv", "aten::convolution", "compute", "float32"),
        ("fc1", "aten::addmm", "compute", "float32"),
        ("cpp_fused_gelu_view_1", "fused gelu_view", "other", ""),
        ("fc2", "aten::mm", "compute", "float32"),
        ("cpp_fused__softmax_bmm_2", "fused softmax_bmm", "other", ""),
    ]
    assert [kernel.ms for kernel in found] == pytest.approx([2e-3, 14e-3, 10e-3, 4e-3, 8e-3, 6e-3])
    assert len({kernel.key for kernel in found}) == len(found)


def test_a_layer_without_a_call_of_its_own_is_in_the_kernel_of_its_name() -> None:
    found = kernels_of_calls(compiled_call(), [compiled_call()], FUSED, gpu=False)
    assert rows(found)[-1] == ("cpp_fused__softmax_bmm_2", "fused softmax_bmm", "compute", "")
    # three of one shape in the graph, two calls: none of them is told apart
    other = {**NODES, "fc3": NODES["fc1"]}
    found = kernels_of_calls(compiled_call(), [compiled_call()], other, gpu=False)
    computing = [kernel.name for kernel in found if kernel.kind == "compute"]
    assert computing == ["conv", "aten::addmm", "aten::mm", "cpp_fused__softmax_bmm_2"]


def test_a_gpu_s_time_is_that_of_what_was_launched() -> None:
    found = kernels_of_calls(compiled_call(gpu=8), [compiled_call(gpu=8)], NODES, gpu=True)
    assert [(kernel.name, kernel.ms) for kernel in found] == [
        ("cpp_fused_convolution_0", 8e-3),
        ("conv", 8e-3),
        ("cpp_fused_gelu_view_1", 8e-3),
    ]


def test_calls_that_differ_are_no_profile(vit: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels_of_calls(compiled_call(), [compiled_call()[:-1]], NODES, gpu=False) == []
    reader = TorchCompiledReader()
    monkeypatch.setattr(reader, "_load", lambda *_: lambda x: x)
    monkeypatch.setattr(torch_compiled, "profiled_call", lambda *_, **__: [])
    with pytest.raises(MeasurementError, match=r"float\.torch: .*names no kernel"):
        reader.kernels(vit[0], 1, images(1).numpy(), 1)


def test_what_cannot_be_told_is_refused_in_one_line(
    vit: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for target in TORCH:
        with pytest.raises(UsageError, match="simulated in floats"):
            check_target(target)
    check_target("cpu-onnxruntime")
    with pytest.raises(TargetMissingError, match="no profiler of mobile-ncnn"):
        check_target("mobile-ncnn")
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(TargetMissingError, match="Linux and Windows only"):
        TorchCompiledReader().kernels(vit[0], 1, images(1).numpy(), 1)


@pytest.mark.skipif(gpu_missing() is None, reason="there is a GPU")
def test_without_a_gpu_its_profile_is_exit_6(vit: list[Path]) -> None:
    with pytest.raises(TargetMissingError, match="needs an NVIDIA GPU"):
        profile_files("cuda-torch", vit, input_shape=SHAPE)


@pytest.mark.skipif(gpu_missing() is not None, reason="needs an NVIDIA GPU")
def test_on_a_gpu_every_layer_has_its_kernels(vit: list[Path]) -> None:
    (floats,) = profile_files("cuda-torch", vit[:1], input_shape=SHAPE, seconds=0.1, rounds=2)
    computing = [kernel for kernel in floats.kernels if kernel.kind == "compute"]
    assert {kernel.layer for kernel in computing} == set(layers_of(vit[0]))
    assert {kernel.precision for kernel in computing} == {"float16"}


class Branches(nn.Module):
    """A convolution, two equal layers side by side, a product too narrow for a library."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.stem(x)).flatten(2).transpose(1, 2)
        scores = self.left(tokens) @ self.right(tokens).transpose(1, 2)
        logits: Tensor = self.head((scores.softmax(-1) @ tokens).mean(1))
        return logits


@pytest.mark.slow  # the compiler
def test_a_compiled_graph_s_library_calls_are_its_layers(tmp_path: Path) -> None:
    paths = saved(Branches(), tmp_path)
    found = profile_files("cpu-torch-compiled", paths, input_shape=SHAPE, seconds=0.05, rounds=2)
    for path, one in zip(paths, found, strict=True):
        check_profile("cpu-torch-compiled", path, one)
        assert [kernel for kernel in one.kernels if kernel.op.startswith("fused ")]
    assert [kernel for kernel in found[1].kernels if kernel.op.startswith("deploykit::")]
