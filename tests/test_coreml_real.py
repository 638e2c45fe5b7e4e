"""Whole backbones, untrained, as Core ML packages: minutes each."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("coremltools")

from deploykit._compat import timm
from deploykit.export.coreml import Coreml
from deploykit.export.mil_evaluate import MilProgram
from deploykit.export.parity import compare, make_reference
from deploykit.export.registry import Source
from deploykit.export.rounding import FLOOR_MARGIN_DB, half_floor_db
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.factories import make_artifact
from tests.graphs import images, make_backbone, shake

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BACKBONES = {
    "shvit_s4": 256,
    "deit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
}


@cache
def model_of(name: str) -> CapturedModel:
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=1000)
    if "shvit" not in name:  # shaken, its values pass 65504, where float16 ends
        shake(module)
    return capture(make_backbone(module, BACKBONES[name], 1000))


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("precision", ["fp32", "w8a8", "w4a16"])
def test_backbone(name: str, precision: str, tmp_path: Path) -> None:
    model, size = model_of(name), BACKBONES[name]

    def calibration() -> Iterable[Tensor]:
        return [images(4, size, seed=1), images(4, size, seed=2)]

    graph_module = model.graph_module
    if precision != "fp32":
        weights, inputs = map(int, precision[1:].split("a"))
        graph_module = quantize(model, QuantizeOptions(weights, inputs), calibration).graph_module
    path = tmp_path / f"{name}.mlpackage"
    made = Coreml().export(Source(graph_module, model.backbone, precision), path)
    assert made.dynamic_batch
    batch = images(8, size, seed=5)
    with torch.no_grad():
        wanted, floats = graph_module(batch), model.graph_module(batch)
    found = MilProgram(path)(batch)
    if precision == "w8a8":
        reference = make_reference("simulation", graph_module, batch, floats, seed=0)
        row = compare(make_artifact(half=True), "mil", len(batch), found, reference, "random")
        assert row.passed, row
    else:
        floor = half_floor_db(graph_module, batch)
        assert sqnr_db(wanted, found) >= floor - FLOOR_MARGIN_DB
    parameters = sum(p.numel() for p in model.backbone.module.parameters())
    written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    least = parameters * {"fp32": 2.0, "w8a8": 1.0, "w4a16": 0.5}[precision]
    assert written < least * {"fp32": 1.05, "w8a8": 1.15, "w4a16": 1.3}[precision]
