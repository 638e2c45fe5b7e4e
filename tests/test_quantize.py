"""Quantised graphs of tiny networks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from deploykit.graph.capture import CapturedModel
from deploykit.graph.quantized import FLOAT, LayerPlan, QuantizedModel
from deploykit.graph.signal import sqnr_db
from deploykit.quant.quantize import QuantizeOptions, quantize
from tests.graphs import (
    SIZE,
    TinyCnn,
    aten,
    batches,
    captured,
    images,
    nodes_of,
    shake,
    tiny_cnn,
    tiny_shvit,
    tiny_vit,
)

WIDTHS = [(8, 8), (6, 6), (4, 8), (4, 4), (4, FLOAT), (3, 3), (2, 8)]
MODELS = {"cnn": tiny_cnn, "vit": tiny_vit}
ops = torch.ops.deploykit


@cache
def model_of(name: str) -> CapturedModel:
    return captured(MODELS[name]())


@cache
def quantized(name: str, weights: int, inputs: int) -> QuantizedModel:
    return quantize(model_of(name), QuantizeOptions(weights, inputs), batches(count=16))


def sqnr_of(name: str, weights: int, inputs: int) -> float:
    """On calibration images: so few leave the ranges of others' channels too narrow."""
    x = images(16, seed=1)
    return sqnr_db(model_of(name).graph_module(x), quantized(name, weights, inputs)(x))


def plan_of(model: QuantizedModel) -> dict[str, LayerPlan]:
    return {plan.layer: plan for plan in model.plans}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights", "inputs"), WIDTHS)
def test_finite_at_every_width_and_any_batch(name: str, weights: int, inputs: int) -> None:
    model = quantized(name, weights, inputs)
    assert model.bits == f"w{weights}a{inputs}"
    for count in (1, 5):
        result = model(images(count))
        assert result.shape == (count, 10) and torch.isfinite(result).all()
    assert set(model.layer_sqnr_db) == {p.node for p in model.plans if not p.is_float}
    assert all(value > 0 for value in model.layer_sqnr_db.values())


@pytest.mark.parametrize("name", MODELS)
def test_noise_falls_with_bits(name: str) -> None:
    sqnr = {widths: sqnr_of(name, *widths) for widths in WIDTHS}
    assert sqnr[8, 8] > 25
    assert sqnr[8, 8] > sqnr[6, 6] > sqnr[4, 4] > sqnr[3, 3] > 0
    assert sqnr[8, 8] > sqnr[4, 8] > sqnr[2, 8]
    assert sqnr[4, FLOAT] > sqnr[4, 4]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weights", "inputs"), WIDTHS)
def test_codes_are_int8_within_their_width(name: str, weights: int, inputs: int) -> None:
    model = quantized(name, weights, inputs)
    seen = 0
    for node in nodes_of(model.graph_module, ops.dequantize.default):
        codes = model.graph_module.get_buffer(str(node.args[0].target))
        scale = model.graph_module.get_buffer(str(node.args[1].target))
        bits = node.args[3]
        assert torch.isfinite(scale).all() and (scale > 0).all()
        assert scale.shape == (codes.shape[node.args[2]],)
        if bits == 32:
            assert codes.dtype == torch.int32
            continue
        seen += 1
        assert codes.dtype == torch.int8 and bits in (weights, 8)
        assert int(codes.min()) >= -(2 ** (bits - 1)) and int(codes.max()) < 2 ** (bits - 1)
    assert seen == sum(plan.weight_bits not in (None, FLOAT) for plan in model.plans)
    # no float copy of a quantised weight is left behind
    weights_left = [p for _, p in model.graph_module.named_parameters() if p.ndim in (2, 4)]
    assert not weights_left


def test_the_plan_keeps_first_last_depthwise_and_the_image_at_8_bits() -> None:
    plans = plan_of(quantized("cnn", 4, 4))
    assert {name: plan.bits for name, plan in plans.items()} == {
        "stem": "w8a8",
        "depthwise": "w8a8",
        "narrow": "w4a4",
        "wide": "w4a4",
        "head": "w8a8",
    }
    assert plans["stem"].note == "first layer kept at 8 bits"
    assert plans["depthwise"].note == "depthwise layer kept at 8 bits"
    assert plans["head"].note == "last layer kept at 8 bits"
    bare = quantize(model_of("cnn"), QuantizeOptions(4, 4, keep_8bit=()), batches())
    assert {name: plan.bits for name, plan in plan_of(bare).items()} == {
        "stem": "w4a8",
        "depthwise": "w4a4",
        "narrow": "w4a4",
        "wide": "w4a4",
        "head": "w4a4",
    }
    assert plan_of(bare)["stem"].note == "the image keeps 8 bits"


def test_a_dynamic_batch_makes_no_layer_the_first() -> None:
    """The batch's size reaches every reshape, and is no image."""
    notes = {plan.layer: plan.note for plan in quantized("vit", 4, 4).plans if plan.note}
    assert notes == {
        "patch_embed.proj": "first layer kept at 8 bits",
        "head": "last layer kept at 8 bits",
    }


def test_float_layers_stay_as_they_are() -> None:
    options = QuantizeOptions(4, 4, float_layers=("blocks.0.*", "head"))
    model = quantize(model_of("vit"), options, batches())
    kept = {plan.layer for plan in model.plans if plan.is_float}
    assert {"blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "head"} <= kept
    assert not any(layer.startswith("blocks.1") for layer in kept)
    names = dict(model.graph_module.named_parameters())
    assert "blocks.0.attn.qkv.weight" in names and "blocks.1.attn.qkv.weight" not in names
    everything = quantize(model_of("vit"), QuantizeOptions(8, 8, float_layers=("*",)), batches())
    x = images(4)
    assert sqnr_db(model_of("vit").graph_module(x), everything(x)) > 110


def test_softmax_outputs_take_the_grid_with_the_least_error() -> None:
    module = quantized("vit", 8, 8).graph_module
    assert not nodes_of(module, ops.fake_quantize_log.default, ops.fake_quantize_twin.default)
    module = quantized("vit", 3, 3).graph_module
    assert nodes_of(module, ops.fake_quantize_log.default, ops.fake_quantize_twin.default)
    for choice, count in (("uniform", 0), ("log-sqrt2", 2)):
        model = quantize(model_of("vit"), QuantizeOptions(4, 4, softmax=choice), batches())
        assert len(nodes_of(model.graph_module, ops.fake_quantize_log.default)) == count


def test_shvits_transposed_softmax_takes_it_too() -> None:
    options = QuantizeOptions(4, 4, softmax="log-sqrt2")
    model = quantize(captured(tiny_shvit(), 64), options, batches(64, 2))
    attention = [plan for plan in model.plans if plan.softmax_input]
    assert len(attention) == 9
    assert len(nodes_of(model.graph_module, ops.fake_quantize_log.default)) == 9
    assert not nodes_of(model.graph_module, aten.batch_norm.default)
    assert torch.isfinite(model(images(2, 64))).all()


def test_norms_are_folded_where_asked() -> None:
    records = {record.name: record for record in quantized("vit", 4, 4).records}
    details = records["fold_norms"].details
    # Between the last norm and the head the class token is picked out.
    assert len(details["relative_error"]) == 4
    assert list(details["declined"].values()) == [
        "it is averaged or mixed with others before it is read"
    ]
    for errors in details["relative_error"].values():
        assert errors["off"] >= min(errors.values())
    asked = quantize(model_of("vit"), QuantizeOptions(4, 4, norm_fold="repq"), batches())
    summaries = {record.name: record.summary for record in asked.records}
    assert summaries["fold_norms"] == "4 of 5 norms folded (repq-mean 4)"
    off = quantize(model_of("vit"), QuantizeOptions(4, 4, norm_fold="off"), batches())
    assert "fold_norms" not in {record.name for record in off.records}
    x = images(16, seed=7)
    wanted = model_of("vit").graph_module(x)
    assert sqnr_db(wanted, quantized("vit", 4, 4)(x)) != sqnr_db(wanted, off(x))


@pytest.mark.parametrize("name", MODELS)
def test_equal_runs_give_equal_tensors_and_leave_the_model_alone(name: str) -> None:
    model = model_of(name)
    before = {key: value.clone() for key, value in model.graph_module.state_dict().items()}
    code = model.graph_module.code
    one, two = (quantize(model, QuantizeOptions(4, 4), batches()) for _ in range(2))
    tensors = one.graph_module.state_dict(), two.graph_module.state_dict()
    assert list(tensors[0]) == list(tensors[1])
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert one.graph_module.code == two.graph_module.code
    assert one.plans == two.plans and one.layer_sqnr_db == two.layer_sqnr_db
    assert model.graph_module.code == code
    after = model.graph_module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_dead_channels_keep_their_bias() -> None:
    module = tiny_cnn()
    with torch.no_grad():
        module.narrow.weight[:5] = 0
        module.narrow.bias[:5] = torch.tensor([0.0, 1.0, 2.0, 0.5, 1e-3])
        module.head.weight[2] = 0
    model = captured(module)
    for weights, inputs in ((8, 8), (4, 4), (2, 8)):
        result = quantize(model, QuantizeOptions(weights, inputs), batches())
        x = images(4)
        assert torch.isfinite(result(x)).all()
        assert result(x)[:, 2].std() < 1e-5  # nothing but its bias, in float and here
        torch.testing.assert_close(
            result(x)[:, 2], model.graph_module(x)[:, 2], atol=1e-4, rtol=1e-3
        )


def test_a_tiny_input_does_not_overflow_the_biases() -> None:
    """Scale of the input 1e-7: the bias is 1e9 and more steps of the accumulator."""
    module = tiny_cnn()
    model = captured(module)
    tiny = lambda: [images(4) * 1e-6]  # noqa: E731
    result = quantize(model, QuantizeOptions(8, 8), tiny)
    x = images(4) * 1e-6
    assert sqnr_db(model.graph_module(x), result(x)) > 25
    for node in nodes_of(result.graph_module, ops.dequantize.default):
        if node.args[3] == 32:
            codes = result.graph_module.get_buffer(str(node.args[0].target))
            assert int(codes.abs().max()) <= 2**30


def test_all_black_images_are_survived() -> None:
    model = model_of("vit")
    result = quantize(model, QuantizeOptions(4, 4), lambda: [torch.zeros(2, 3, SIZE, SIZE)])
    assert torch.isfinite(result(torch.zeros(2, 3, SIZE, SIZE))).all()
    assert torch.isfinite(result(images())).all()


class Shared(nn.Module):
    """One convolution applied twice, each time followed by another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.conv(self.stem(x))).relu()
        return self.head(self.two(self.conv(x)).mean((2, 3)))


class InPlace(TinyCnn):
    """Residual sums in place, as ResNets write them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_norm(self.stem(x)))
        y = self.depthwise_norm(self.depthwise(x))
        y += x
        y = self.act(y)
        x = self.act(self.wide(self.act(self.narrow(y))))
        return self.head(self.head_norm(x.mean((2, 3))))


class Straight(nn.Module):
    """Layers that read each other's results as they are: nothing between two linear layers, or
    between them and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.low, self.high = nn.Linear(8, 4), nn.Linear(4, 8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.high(self.low(self.stem(x).relu().flatten(2).transpose(1, 2)))
        scores = self.left(tokens) @ self.right(tokens).transpose(1, 2)
        return self.head((scores.softmax(-1) @ tokens).mean(1))


class Separate(nn.Module):
    """Two heads whose queries, keys and values are made by a layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.project, self.head = nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).relu().flatten(2).transpose(1, 2)
        parts = (self.query(tokens), self.key(tokens), self.value(tokens))
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in parts)
        mixed = ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(self.project(mixed).mean(1))


@pytest.mark.parametrize("make", [Shared, InPlace, Straight, Separate])
def test_unusual_networks_lose_little(make: type[nn.Module]) -> None:
    """Shared weights, sums in place, layers that read each other, values of a layer's own."""
    model = captured(shake(make()).eval())
    x = images(16, seed=1)  # those of the calibration
    result = quantize(model, QuantizeOptions(8, 8), batches(count=16))
    assert sqnr_db(model.graph_module(x), result(x)) > 25


@pytest.mark.parametrize(("make", "folded"), [(Separate, "1 of 1"), (Straight, "0 of 1")])
def test_a_value_is_folded_where_nothing_else_reads_it(make: type[nn.Module], folded: str) -> None:
    result = quantize(captured(shake(make()).eval()), QuantizeOptions(8, 8), batches())
    record = next(r for r in result.records if r.name == "fold_values")
    assert record.summary == f"{folded} attention values folded"
    reasons = record.details["declined"]
    assert isinstance(reasons, dict)
    assert all("reads its channels too" in reason for reason in reasons.values())
    assert bool(reasons) == (make is Straight)


class OtherReader(nn.Module):
    """An in-place activation whose input somebody else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 3)
        self.c = nn.Conv2d(8, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.relu_(x)
        return (self.b(x) + self.c(y)).mean((2, 3))


def test_an_in_place_activation_with_other_readers() -> None:
    model = captured(shake(OtherReader()).eval())
    x = images(8)
    assert sqnr_db(model.backbone.module(x), model.graph_module(x)) > 110
    result = quantize(model, QuantizeOptions(8, 8), batches())
    assert sqnr_db(model.graph_module(x), result(x)) > 25


class ClassToken(nn.Module):
    """A ViT's stem: patches joined with a token that no convolution made."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, 10)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        if self.joined:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.head(x).mean(1)


@pytest.mark.parametrize("joined", [False, True])
def test_outputs_joined_with_other_values_are_not_quantised(joined: bool) -> None:
    """OpenVINO would carry the codes through the Concat and round the token as well."""
    model = quantize(captured(shake(ClassToken(joined)).eval()), QuantizeOptions(8, 8), batches())
    (conv,) = nodes_of(model.graph_module, aten.conv2d.default)
    (reader,) = conv.users
    assert (reader.target == ops.fake_quantize.default) is not joined
