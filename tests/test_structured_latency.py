"""Times of single layers, really measured with ONNX Runtime here."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from deploykit.errors import UsageError
from deploykit.layer_latency import layer_file, measure_layers
from deploykit.prune.latency import LayerShape

SHAPES = {
    "linear": (LayerShape("linear", (5,), (6, 7)), (1, 5, 7)),
    "conv": (LayerShape("conv", (9, 5, 3, 2), (4, 6)), (1, 6, 5, 5)),
    "patches": (LayerShape("conv", (8, 2, 4, 4), (3, 6)), (1, 6, 2, 2)),
    "depthwise": (LayerShape("depthwise", (8, 8, 7, 1), (4,)), (1, 4, 8, 8)),
    "attention": (LayerShape("attention", (2, 9, 4), (3, 8, 16)), (2, 3, 9, 16)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_s_file_computes_what_its_shape_says(name: str) -> None:
    shape, output = SHAPES[name]
    data, size = layer_file(shape)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"x": np.ones(size, np.float32)})
    assert result.shape == output
    assert np.isfinite(result).all()


def test_every_layer_gets_a_time() -> None:
    times = measure_layers(
        [LayerShape("linear", (64,), (32, 32)), LayerShape("linear", (64,), (512, 512))]
    )
    assert len(times) == 2 and all(np.isfinite(time) and time > 0 for time in times)


def test_what_cannot_be_timed_is_refused() -> None:
    with pytest.raises(UsageError, match="no layer of kind 'norm'"):
        layer_file(LayerShape("norm", (1,), (1,)))
    with pytest.raises(UsageError, match="doesn't load"):
        measure_layers([SHAPES["linear"][0]], target="mobile-ncnn")
    assert measure_layers([]) == []
