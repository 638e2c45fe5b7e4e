"""Lowering to operators of other converters changes no number that it may not change."""

from __future__ import annotations

import operator
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from deploykit.errors import DeploykitError
from deploykit.export.archive import archived
from deploykit.export.ncnn import NcnnExporter
from deploykit.export.plain_lowering import lower_plainly
from deploykit.export.registry import Source
from deploykit.export.workers.ncnn import _check_layers, _layers
from deploykit.export.workers.tflite_codes import Weight, _key, _layouts, _packed
from deploykit.graph.capture import CapturedModel
from deploykit.graph.ops import fake_quantize_log, fake_quantize_twin
from deploykit.graph.quantized import FLOAT, QuantizedModel
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.graphs import batches, captured, images, make_backbone, nodes_of, tiny_cnn, tiny_vit

MODELS = {"cnn": tiny_cnn, "vit": tiny_vit}
WIDTHS = [(8, 8), (4, 8), (4, 4), (4, FLOAT)]
plain = torch.ops.quantized_decomposed


@cache
def model_of(name: str) -> CapturedModel:
    return captured(MODELS[name]())


@cache
def quantized(name: str, weights: int, inputs: int) -> QuantizedModel:
    return quantize(model_of(name), QuantizeOptions(weights, inputs), batches(count=16))


def namespaces(graph_module: torch.fx.GraphModule) -> set[str]:
    targets = (n.target for n in graph_module.graph.nodes if n.op == "call_function")
    return {"getitem" if t is operator.getitem else t.namespace for t in targets}


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", MODELS)
def test_with_codes_aside_the_graph_computes_the_simulation(
    name: str, widths: tuple[int, int]
) -> None:
    model = quantized(name, *widths)
    before = [str(node.target) for node in model.graph_module.graph.nodes]
    lowered = lower_plainly(model.graph_module, codes_in_graph=False)
    assert namespaces(lowered.graph_module) <= {"aten", "quantized_decomposed", "getitem"}
    x = images(4)
    assert sqnr_db(model(x), lowered.graph_module(x)) > 100
    assert [str(node.target) for node in model.graph_module.graph.nodes] == before
    layers = [*lowered.static, *lowered.dynamic, *lowered.weight_only]
    assert len(layers) == len(set(layers)) == len(lowered.codes) > 0
    assert bool(lowered.weight_only) == (widths[1] == FLOAT)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", MODELS)
def test_codes_in_the_graph_are_ours(name: str, widths: tuple[int, int]) -> None:
    model = quantized(name, *widths)
    lowered = lower_plainly(model.graph_module, codes_in_graph=True)
    assert namespaces(lowered.graph_module) <= {"aten", "quantized_decomposed", "getitem"}
    kept = nodes_of(lowered.graph_module, plain.dequantize_per_channel.default)
    linear = sum("linear" in layer for layer in lowered.dynamic)
    assert len(kept) == len(lowered.static) + linear
    ours = {
        t.flatten().sort().values.numpy().tobytes()
        for n, t in model.graph_module.named_buffers()
        if "weight_codes" in n
    }
    for node in kept:
        codes = getattr(lowered.graph_module, node.args[0].target)
        assert codes.dtype == torch.int8
        assert codes.flatten().sort().values.numpy().tobytes() in ours
        packed = widths[0] <= 4 and node.args[4:6] == (-8, 7)
        assert packed or node.args[4:6] == (-128, 127)


def test_layers_that_choose_their_grid_are_no_farther_from_the_float_model() -> None:
    for name in MODELS:
        for widths in ((8, 8), (4, 4)):
            model = quantized(name, *widths)
            lowered = lower_plainly(model.graph_module, codes_in_graph=True)
            assert lowered.dynamic
            x = images(8)
            wanted = model_of(name).graph_module(x)
            own, theirs = (sqnr_db(wanted, run(x)) for run in (model, lowered.graph_module))
            assert theirs > own - 2
            assert nodes_of(lowered.graph_module, plain.quantize_per_token.default)


def test_a_float_graph_stays_as_it_is() -> None:
    model = model_of("vit")
    lowered = lower_plainly(model.graph_module, codes_in_graph=True)
    assert lowered.codes == lowered.static == lowered.dynamic == lowered.weight_only == ()
    x = images(2)
    torch.testing.assert_close(lowered.graph_module(x), model.graph_module(x), rtol=0, atol=0)


class Tables(nn.Module):
    """Both quantisers without equal steps, on values of either sign and on zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.relu()
        values = [2.0 ** (-k / 2) for k in range(15)] + [0.0]
        log = fake_quantize_log(x, 0.0, 2.0, 0.25, values, 0.0, 0)
        shifted = fake_quantize_log(x - 0.5, 0.125, 1.0, 0.0, [1.0, 0.5, 0.25, 0.0], 0.25, 0)
        steps = [-0.5, -0.25, -0.125, -0.0625, 0.0, 0.5, 1.0, 1.5]
        return log + shifted + fake_quantize_twin(x - 1, 0.0, 0.125, 0.5, steps, 0.0, 0)


def test_tables_become_lookups() -> None:
    model = captured(Tables())
    lowered = lower_plainly(model.graph_module, codes_in_graph=True)
    assert namespaces(lowered.graph_module) == {"aten"}
    x = images(2)
    wanted, found = model.graph_module(x), lowered.graph_module(x)
    # a logarithm taken otherwise may move a value at the very edge of two codes
    assert (wanted != found).float().mean() < 1e-3
    assert wanted.unique().numel() > 16


def test_the_archive_is_for_one_image() -> None:
    model = model_of("cnn")
    with archived(model.graph_module, model.backbone) as path:
        program = torch.export.load(path)
        x = images(1)
        torch.testing.assert_close(program.module()(x), model.graph_module(x))
        assert tuple(program.example_inputs[0][0].shape) == (1, 3, 32, 32)
    assert not path.exists()


def test_a_graph_that_needs_more_images_is_one_line() -> None:
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, 2, 3)

    graph_module = torch.fx.symbolic_trace(Pairs())
    backbone = make_backbone(Pairs(), size=3)
    with (
        pytest.raises(DeploykitError, match="tiny can't be handed on: ") as caught,
        archived(graph_module, backbone),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_ncnn_takes_no_quantised_activations(tmp_path: object) -> None:
    """Refused before anything is started, so also where there is no environment."""
    model = quantized("cnn", 8, 8)
    source = Source(model.graph_module, model.backbone, "w8a8")
    with pytest.raises(DeploykitError, match="no integer layers; export the float model"):
        NcnnExporter().export(source, tmp_path / "model.ncnn")  # type: ignore[operator]


def test_ncnn_s_leftovers_are_named() -> None:
    param = "7767517\n3 3\nInput in0 0 1 in0\nTensor.reshape r 1 1 in0 1\ntorch.unbind u 1 1 1 2\n"
    with pytest.raises(ValueError, match=r"ncnn has no layer for Tensor\.reshape, torch\.unbind"):
        _check_layers(_layers(param))
    _check_layers(_layers("7767517\n2 2\nInput in0 0 1 in0\nConvolution c 1 1 in0 out0 0=8\n"))


def test_four_bit_codes_are_packed_low_half_first() -> None:
    codes = np.array([1, -1, 7, -8, 3], np.int8)
    assert _packed(codes).tolist() == [0xF1, 0x87, 0x03]


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 2), (6, 1, 3, 3)])
def test_weights_are_found_by_their_floats_in_tflite_s_order(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, shape, dtype=np.int8)
    scale = rng.uniform(0.001, 0.1, shape[0]).astype(np.float32)
    floats = codes.astype(np.float32) * scale.reshape(-1, *[1] * (len(shape) - 1))
    layouts = dict(_layouts(Weight(codes, scale, 8, "static", False)))
    if len(shape) == 2:
        orders = [(0, 1)]
    else:
        orders = [(0, 2, 3, 1)] + ([(1, 2, 3, 0)] if shape[1] == 1 else [])
    assert len(layouts) == len(orders)
    for order in orders:
        stored = layouts[_key(np.ascontiguousarray(floats.transpose(order)).tobytes())]
        np.testing.assert_array_equal(stored.codes, codes.transpose(order).ravel())
