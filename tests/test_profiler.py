"""Times of single layers: each kernel finds its layer, whatever the runtime calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.quant.plan import plan_layers
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.targets import profiler
from deploykit.targets.profiler import layer_times
from deploykit.targets.profiling.profile import FileProfile, KernelTime
from tests.graphs import SIZE, batches, captured, tiny_cnn, tiny_vit

SHAPE = (3, SIZE, SIZE)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("module", [tiny_vit(), tiny_cnn()], ids=["vit", "cnn"])
def test_every_layer_gets_a_time(module: nn.Module, bits: int, tmp_path: Path) -> None:
    model = captured(module)
    layers = [plan.layer for plan in plan_layers(model.graph_module, 8, 8)]
    graph_module = model.graph_module
    if bits < 16:
        graph_module = quantize(model, QuantizeOptions(bits, bits), batches()).graph_module
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_bytes(graph_module, model.backbone))
    times = layer_times(path, layers, input_shape=SHAPE, seconds=0.05)
    assert list(times) == layers
    assert min(times.values()) > 0


def fake_profile(
    monkeypatch: pytest.MonkeyPatch, kernels: list[tuple[str, str, float]], total: float
) -> None:
    """An answer of kernels (owner, kind, ms), all times half of what they are in real calls."""

    def ask(path: Path) -> FileProfile:
        times = [KernelTime(o, o, f"k{i}", "op", kind, "float32", (ms, ms))
                 for i, (o, kind, ms) in enumerate(kernels)]  # fmt: skip
        return FileProfile(path, (total, total), tuple(times))

    monkeypatch.setattr(profiler, "profile_files", lambda _, paths, **__: [ask(paths[0])])


LAYERS = ["stem", "depthwise", "narrow", "wide", "head"]


def cnn_file(folder: Path) -> Path:
    model = captured(tiny_cnn())
    path = folder / "model.onnx"
    path.write_bytes(onnx_bytes(model.graph_module, model.backbone))
    return path


def test_what_works_for_a_layer_counts_for_it_and_all_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = [
        ("stem", "reformat", 1.0),
        ("stem", "compute", 2.0),
        ("depthwise", "compute", 3.0),
        ("narrow", "compute", 4.0),
        ("wide", "compute", 5.0),
        ("head", "other", 6.0),
        ("head", "compute", 7.0),
        ("head", "other", 2.0),
    ]
    fake_profile(monkeypatch, kernels, total=60.0)
    times = layer_times(cnn_file(tmp_path), ["a", "b", "c", "d", "a"], input_shape=SHAPE)
    assert times == pytest.approx({"a": 36, "b": 6, "c": 8, "d": 10})


def test_layers_the_runtime_merged_are_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_profile(monkeypatch, [("", "compute", 1.0)], total=1.0)
    with pytest.raises(UsageError, match=r"5 layers planned, 5 .* 1 computing kernels.*--latency"):
        layer_times(cnn_file(tmp_path), LAYERS, input_shape=SHAPE)
