"""Files of the mobile runtimes compute what their graphs compute. Each needs its environment."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from deploykit.errors import DeploykitError, UsageError
from deploykit.export.parity import compare, make_reference
from deploykit.export.registry import Exported, Source, get_exporter
from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import FLOAT
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.targets.environments import missing
from deploykit.targets.measure import measure
from deploykit.targets.registry import get_target
from deploykit.types import ParityRow
from tests.factories import make_artifact
from tests.graphs import batches, captured, images, tiny_cnn, tiny_vit

pytestmark = pytest.mark.mobile
MODELS = {"cnn": tiny_cnn, "vit": tiny_vit}
FORMATS = ("executorch", "litert", "ncnn")
SUFFIXES = {"executorch": ".pte", "litert": ".tflite", "ncnn": ".ncnn"}
IMAGES = 8


def needs(name: str) -> None:
    reason = missing(name)
    if reason is not None:
        pytest.skip(reason)


@cache
def model_of(name: str) -> CapturedModel:
    return captured(MODELS[name]())


@cache
def graph_of(name: str, precision: str) -> torch.fx.GraphModule:
    model = model_of(name)
    if precision[0] == "f":
        return model.graph_module
    weights, inputs = map(int, precision[1:].split("a"))
    return quantize(model, QuantizeOptions(weights, inputs), batches(count=16)).graph_module


def exported(
    form: str, name: str, precision: str, folder: Path
) -> tuple[Path, Exported, ParityRow]:
    """The file, what the exporter says, and its logits beside the graph's."""
    needs(form)
    model, graph_module = model_of(name), graph_of(name, precision)
    exporter = get_exporter(form)
    assert exporter.available() is None
    path = folder / f"{name}{exporter.suffix}"
    result = exporter.export(Source(graph_module, model.backbone, precision), path)
    reading = exporter.reader(path)
    assert reading is not None
    runtime, read = reading
    assert form in runtime
    x = images(IMAGES)
    rounds = precision[0] == "w" and not precision.endswith(f"a{FLOAT}")
    float_logits = model.graph_module(x) if rounds else None
    reference = make_reference("graph", graph_module, x, float_logits, seed=0)
    row = compare(make_artifact(path=path), runtime, 1, read(x), reference, "random")
    return path, result, row


@pytest.mark.parametrize("form", FORMATS)
def test_float_convolutions(form: str, tmp_path: Path) -> None:
    path, result, row = exported(form, "cnn", "fp32", tmp_path)
    assert row.passed, row
    assert row.top1_agreement == 100
    assert not result.dynamic_batch
    assert result.layers["float"] == 5
    kernels = get_target(f"mobile-{form}").kernels(path)
    assert all(kind.startswith("float ") for kind in kernels)
    assert sum(kernels.values()) >= 5


@pytest.mark.parametrize("form", ["executorch", "litert"])
@pytest.mark.parametrize("precision", ["w8a8", "w4a4"])
def test_integer_convolutions(form: str, precision: str, tmp_path: Path) -> None:
    path, result, row = exported(form, "cnn", precision, tmp_path)
    assert row.passed, row
    # far better than parity asks: the same codes, but for the head's input grid
    assert row.sqnr_db > row.noise_db
    assert result.layers["int8"] == 4
    kernels = get_target(f"mobile-{form}").kernels(path)
    assert kernels["int8 Conv"] == 3
    assert kernels["int8 DepthwiseConv"] == 1
    assert sum(count for kind, count in kernels.items() if "dynamic FullyConnected" in kind) == 1


@pytest.mark.parametrize("form", ["executorch", "litert"])
def test_four_bit_linear_layers(form: str, tmp_path: Path) -> None:
    path, result, row = exported(form, "vit", "w4a8", tmp_path)
    assert row.passed, row
    assert result.layers["int4 dynamic"] == 8
    assert get_target(f"mobile-{form}").kernels(path)["int4 dynamic FullyConnected"] == 8
    assert any("choose their input's grid" in note for note in result.notes)


@pytest.mark.parametrize("form", ["executorch", "litert"])
def test_weight_only_codes_are_computed_as_floats(form: str, tmp_path: Path) -> None:
    path, result, row = exported(form, "cnn", f"w4a{FLOAT}", tmp_path)
    assert row.passed, row
    assert not any("dynamic" in kind for kind in result.layers)
    if form == "litert":  # 8 bits a code in the file, where ExecuTorch holds floats
        assert result.layers == {"float with int8 weights": 5}
        numbers = sum(p.numel() for p in model_of("cnn").graph_module.parameters())
        assert path.stat().st_size < 4 * numbers


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_none_is_one_line(form: str, tmp_path: Path) -> None:
    needs(form)
    path = tmp_path / f"bad{SUFFIXES[form]}"
    if form == "ncnn":
        path.mkdir()
        (path / "model.param").write_bytes(b"garbage")
    else:
        path.write_bytes(b"garbage" * 100)
    with pytest.raises((UsageError, DeploykitError)) as caught:
        get_target(f"mobile-{form}").load(path, 1)
    assert "\n" not in str(caught.value)
    assert "bad" in str(caught.value) or "died" in str(caught.value)


def test_ncnn_stores_half_the_bits(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    whole, _, _ = exported("ncnn", "cnn", "fp32", tmp_path)
    half, result, row = exported("ncnn", "cnn", "fp16", tmp_path / "half")
    assert result.precision == "fp16"
    assert 40 < row.sqnr_db < 80
    sizes = [(path / "model.bin").stat().st_size for path in (half, whole)]
    assert sizes[0] < 0.7 * sizes[1]


def test_ncnn_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(DeploykitError, match=r"ncnn has no layer for Tensor\.reshape") as caught:
        exported("ncnn", "vit", "fp32", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_executorch_cannot_lower_is_one_line(tmp_path: Path) -> None:
    needs("executorch")

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x).flatten(1)

    model = captured(Odd(), size=8)
    path = tmp_path / "odd.pte"
    with pytest.raises(DeploykitError) as caught:
        get_exporter("executorch").export(Source(model.graph_module, model.backbone, "fp32"), path)
    assert "\n" not in str(caught.value)
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_files_are_measured_where_their_runtime_is(form: str, tmp_path: Path) -> None:
    path, _, _ = exported(form, "cnn", "fp32", tmp_path)
    (row,) = measure(
        f"mobile-{form}",
        [("original", path, "fp32")],
        input_shape=(3, 32, 32),
        min_samples=16,
        min_seconds=0.05,
        max_seconds=0.5,
        warmup_seconds=0.0,
    )
    assert row.samples >= 16
    assert row.device.runtime.startswith(form)
    assert row.kernels == get_target(f"mobile-{form}").kernels(path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["executorch", "litert"])
@pytest.mark.parametrize("precision", ["fp32", "w8a8"])
def test_attention(form: str, precision: str, tmp_path: Path) -> None:
    _, result, row = exported(form, "vit", precision, tmp_path)
    assert row.passed, row
    assert ("int8 dynamic" in result.layers) == (precision == "w8a8")
