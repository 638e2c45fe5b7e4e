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


def fake_answer(
    monkeypatch: pytest.MonkeyPatch, kernels: list[tuple[str, str, float]], total: float
) -> None:
    def ask(*_: object, **__: object) -> dict[str, object]:
        return {"total_ms": total, "kernels": kernels}

    monkeypatch.setattr(profiler, "ask", ask)


def test_kernels_between_layers_count_for_the_next_and_all_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names as ONNX Runtime gives them: after the output value, decorated, or of its own making."""
    model = captured(tiny_cnn())
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_bytes(model.graph_module, model.backbone))
    kernels = [
        ("Transpose", "Transpose", 1.0),
        ("relu_nchwc", "Conv", 2.0),
        ("node_Conv_34_token_3", "QLinearConv", 3.0),
        ("some_name", "FusedConv", 4.0),
        ("relu_2_nchwc", "Conv", 5.0),
        ("node_mean", "ReduceMean", 6.0),
        ("node_linear/MatMulFusion", "FusedGemm", 7.0),
        ("cast", "Cast", 2.0),
    ]
    fake_answer(monkeypatch, kernels, total=60.0)
    layers = ["stem", "depthwise", "narrow", "wide", "head"]
    times = layer_times(path, layers, input_shape=SHAPE)
    assert times == pytest.approx({"stem": 6, "depthwise": 6, "narrow": 8, "wide": 10, "head": 30})


def test_layers_the_runtime_merged_are_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = captured(tiny_cnn())
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_bytes(model.graph_module, model.backbone))
    fake_answer(monkeypatch, [("all", "Attention", 1.0)], total=1.0)
    layers = ["stem", "depthwise", "narrow", "wide", "head"]
    with pytest.raises(UsageError, match=r"5 layers planned, 5 .* 1 computing kernels.*--latency"):
        layer_times(path, layers, input_shape=SHAPE)
