"""Rounding in closed form: GPTQ, the ridge correction, bias correction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploykit.graph.layer_rows import LayerShape
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quant.ranges import weight_scale
from deploykit.quant.rounding import layer
from deploykit.quant.rounding.closed_form import gptq_codes, ridge_correction
from deploykit.quant.rounding.moments import LayerMoments
from tests.graphs import aten, batches, captured, images, nodes_of, shake
from tests.test_units import HOSTS


def correlated(groups: int, rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, width, width, generator=generator)
    return torch.randn(groups, rows, width, generator=generator) @ mix


def covariance(x: Tensor) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    return x.transpose(1, 2) @ x / x.shape[1]


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3),
    outputs=st.integers(1, 9),
    width=st.integers(1, 40),
    bits=st.integers(2, 8),
    seed=st.integers(0, 1000),
)
def test_gptq_gives_codes_of_its_width(
    groups: int, outputs: int, width: int, bits: int, seed: int
) -> None:
    weight = torch.randn(groups, outputs, width, generator=torch.Generator().manual_seed(seed))
    scale = weight_scale(weight.flatten(0, 1), bits).reshape(groups, outputs)
    codes = gptq_codes(weight, scale, bits, covariance(correlated(groups, 64, width, seed)))
    assert codes.shape == weight.shape and torch.equal(codes, codes.round())
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_halves_the_output_error_of_correlated_inputs(bits: int) -> None:
    x, weight = correlated(2, 2000, 96), torch.randn(2, 32, 96)
    scale = weight_scale(weight.flatten(0, 1), bits).reshape(2, 32)
    nearest = torch.round(weight / scale[..., None]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    error = {}
    for name, codes in (
        ("nearest", nearest),
        ("gptq", gptq_codes(weight, scale, bits, covariance(x))),
    ):
        change = codes * scale[..., None] - weight
        error[name] = float((change @ covariance(x) * change).sum())
    assert error["gptq"] < 0.6 * error["nearest"]


def test_gptq_of_independent_inputs_is_rounding_to_nearest() -> None:
    weight = torch.randn(1, 16, 24)
    scale = weight_scale(weight[0], 4)[None]
    codes = gptq_codes(weight, scale, 4, torch.eye(24)[None])
    assert torch.equal(codes, torch.round(weight / scale[..., None]).clamp(-8, 7))


def test_gptq_survives_inputs_that_never_vary() -> None:
    weight, scale = torch.randn(1, 4, 6), torch.full((1, 4), 0.5)
    assert torch.isfinite(gptq_codes(weight, scale, 4, torch.zeros(1, 6, 6))).all()
    assert torch.isfinite(ridge_correction(torch.zeros(1, 6, 6), torch.zeros(1, 6, 4), 0.01)).all()


def test_the_ridge_finds_the_weight_that_explains_the_error() -> None:
    x = correlated(1, 4000, 20)
    wanted = 0.1 * torch.randn(1, 5, 20)
    error = x @ wanted.transpose(1, 2) + 3.0  # an offset is the bias's business
    centred = (error - error.mean(1, keepdim=True)).transpose(1, 2)
    cross = (centred @ (x - x.mean(1, keepdim=True)) / x.shape[1]).transpose(1, 2)
    found = ridge_correction(covariance(x), cross, 1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert ridge_correction(covariance(x), cross, 1e3).norm() < 0.1 * wanted.norm()


LAYERS = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "1x1": (nn.Conv2d(6, 4, 1), (2, 6, 5, 5)),
    "strided": (nn.Conv2d(6, 4, 3, 2, 1), (2, 6, 7, 7)),
    "dilated": (nn.Conv2d(6, 4, 3, 1, 2, 2), (2, 6, 7, 7)),
    "grouped": (nn.Conv2d(6, 4, 3, 1, 0, 1, 2), (2, 6, 7, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, 1, 1, 1, 6), (2, 6, 7, 7)),
    "same": (nn.Conv2d(6, 4, (3, 2), padding="same"), (2, 6, 7, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_moments_predict_what_a_changed_weight_does(name: str) -> None:
    """The mean output change of dW is dW times the mean input: in every kind of layer."""

    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    layer, shape = LAYERS[name]
    program = torch.export.export(Wrapped(layer), (torch.randn(shape),)).module()
    (node,) = nodes_of(program, aten.linear.default, aten.conv2d.default, aten.conv2d.padding)  # type: ignore[arg-type]
    x, weight = torch.randn(shape), layer.weight.detach()
    args = [x, weight, layer.bias.detach(), *node.args[3:]]
    parts = LayerMoments(LayerShape.of(node, weight))
    with torch.no_grad():
        change = 0.1 * torch.randn_like(weight)
        moved = [x, weight + change, *args[2:]]
        error = node.target(*moved) - node.target(*args)  # type: ignore[operator]
        parts.update(node, args, error)
    moments = parts.both()
    matrices = moments.shape.matrices(change)
    predicted = (matrices @ moments.input_mean[..., None])[..., 0]
    torch.testing.assert_close(predicted, moments.error_mean, rtol=1e-4, atol=1e-5)
    through = moments.covariance() @ matrices.transpose(1, 2)
    torch.testing.assert_close(through, moments.cross_covariance(), rtol=1e-3, atol=1e-4)


def test_inputs_far_from_zero_keep_their_covariance() -> None:
    layer = nn.Linear(6, 4)
    program = torch.export.export(layer, (torch.randn(2, 6),)).module()
    (node,) = nodes_of(program, aten.linear.default)  # type: ignore[arg-type]
    parts = LayerMoments(LayerShape.of(node, layer.weight))
    x = 1e4 + 1e-1 * torch.randn(64, 6)  # squared, their variance is behind the last digit
    for part in x.split(16):
        parts.update(node, [part], torch.zeros(len(part), 4))
    moments = parts.both()
    expected = covariance(x[None].double()).float()
    torch.testing.assert_close(moments.covariance(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moments.input_mean, x.mean(0)[None])


class Summary(nn.Module):
    """Layers that see one row a batch, and one that sees the same row in every image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.token, self.head = nn.Parameter(3 + torch.rand(1, 1, 8)), nn.Linear(8, 10)
        self.ask = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.stem(x).mean((2, 3))
        asked = self.ask(self.token.expand(len(x), 4, 8))
        return self.head((seen + self.mix(seen) + asked.mean(1)).relu())


@pytest.mark.parametrize("count", [1, 2])
def test_a_row_or_two_are_no_reason_to_fail(count: int) -> None:
    """One calibration image, pooled: there is a row to fit and none to try it on."""
    model = captured(Summary().eval())
    options = QuantizeOptions(4, 8, rounding="erq", keep_8bit=())
    made = quantize(model, options, lambda: [images(1, seed=i) for i in range(count)])
    assert torch.isfinite(made.graph_module(images(2))).all()


@pytest.mark.parametrize("name", list(HOSTS)[:2])
def test_what_is_kept_between_layers_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, size = HOSTS[name]
    model, x = captured(make(), size), images(8, size, seed=1)
    options = QuantizeOptions(4, 4, rounding="erq", rounding_images=8)
    kept = quantize(model, options, lambda: [x])(x)
    monkeypatch.setattr(layer, "LIVE_BYTES", 0)
    assert torch.equal(quantize(model, options, lambda: [x])(x), kept)


@pytest.mark.parametrize("name", HOSTS)
def test_each_ingredient_helps_on_images_it_has_not_seen(name: str) -> None:
    make, size = HOSTS[name]
    model = captured(make(), size)
    calibration = lambda: images(256, size, seed=1).split(32)  # noqa: E731
    x = images(16, size, seed=5)
    plain = {"rounding": "nearest", "bias_correction": False}
    found = {}
    erq = {"rounding": "erq", "rounding_images": 256}
    for key, options in {"nearest": plain, "erq": erq}.items():
        result = quantize(model, QuantizeOptions(4, 6, **options), calibration)  # type: ignore[arg-type]
        found[key] = sqnr_db(model.graph_module(x), result(x))
    assert found["erq"] > found["nearest"] + 0.5


def test_bias_correction_removes_the_mean_error() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 8 * 8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(F.relu(x).flatten(1))

    model = captured(shake(One()), 8)
    options = {"keep_8bit": (), "weight_range": "minmax"}
    data = lambda: images(32, 8).split(8)  # noqa: E731
    x = images(32, 8)
    drift = {}
    for corrected in (False, True):
        result = quantize(model, QuantizeOptions(3, 8, bias_correction=corrected, **options), data)  # type: ignore[arg-type]
        drift[corrected] = (result(x) - model.graph_module(x)).mean(0).abs().max()
    assert drift[True] < 0.02 * drift[False]


def test_the_result_is_the_same_each_time() -> None:
    model = captured(HOSTS["vit"][0](), 32)
    options = QuantizeOptions(4, 4, rounding="erq")
    one, two = (quantize(model, options, batches()) for _ in range(2))
    assert torch.equal(one(images()), two(images()))
