"""Real backbones, random weights, as TensorRT engines: slow."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from deploykit._compat import timm
from deploykit.backbones.untrained import make_testable
from deploykit.export.registry import Source
from deploykit.export.tensorrt import TensorrtExporter, TensorrtOptions
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.quantized import FLOAT, QuantizedModel
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.graphs import images, make_backbone
from tests.tensorrt_models import symmetric

pytestmark = pytest.mark.slow

BACKBONES = {
    "shvit_s4": 256,
    "deit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
}
OPTIONS = TensorrtOptions(library="tensorrt_rtx")


@cache
def model_of(name: str) -> CapturedModel:
    module = timm.create_model(name, pretrained=False)
    make_testable(module, 0, BACKBONES[name])  # some norms start at zero
    return capture(make_backbone(module, BACKBONES[name], 1000))


@cache
def quantized(name: str, weights: int, inputs: int) -> QuantizedModel:
    size = BACKBONES[name]
    options = QuantizeOptions(weights, inputs, bias_correction=False, equalize=False)
    model = quantize(model_of(name), options, lambda: [images(2, size, seed=1)])
    symmetric(model.graph_module)
    return model


def report(name: str, kind: str, done: Any, path: Path, start: float) -> None:
    seconds, size = time.monotonic() - start, path.stat().st_size / 1e6
    print(f"\n{name} {kind}: {size:.1f} MB, {seconds:.0f} s, {dict(done.layers)}")


@pytest.mark.parametrize("name", BACKBONES)
def test_fp16(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, path, start = model_of(name), tmp_path / "m.engine", time.monotonic()
    source = Source(model.graph_module, model.backbone, "fp32")
    done = TensorrtExporter(OPTIONS).export(source, path)
    report(name, "fp16", done, path, start)
    assert set(done.layers) == {"float16"}
    reader = TensorrtExporter().reader(path)
    assert reader is not None
    pixels = images(1, BACKBONES[name])
    with torch.no_grad():
        assert sqnr_db(model.graph_module(pixels), reader[1](pixels)) > 35


@pytest.mark.parametrize(("weights", "inputs"), [(8, 8), (4, FLOAT)])
@pytest.mark.parametrize("name", BACKBONES)
def test_codes(name: str, weights: int, inputs: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, path = quantized(name, weights, inputs), tmp_path / "m.engine"
    start = time.monotonic()
    exporter = TensorrtExporter(OPTIONS)
    done = exporter.export(Source(model.graph_module, model.backbone, model.bits), path)
    report(name, model.bits, done, path, start)
    if inputs == FLOAT:
        assert done.layers["int4 weights"] > 0.8 * (len(model.plans) / 2)
    else:
        assert done.layers["int8"] > 0.9 * len(model.plans)
    reader = exporter.reader(path)
    assert reader is not None
    pixels = images(2, BACKBONES[name])
    with torch.no_grad():
        floats = model_of(name).graph_module(pixels)
        wanted, found = model(pixels), reader[1](pixels)
    assert sqnr_db(floats, found) > sqnr_db(floats, wanted) - 1.5
