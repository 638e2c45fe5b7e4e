"""Captured graphs equal their modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deploykit.errors import DeploykitError
from deploykit.graph.capture import capture
from deploykit.graph.edit import add_tensor, clean, constant
from deploykit.graph.signal import sqnr_db
from tests.graphs import (
    SIZE,
    aten,
    captured,
    images,
    make_backbone,
    nodes_of,
    tiny_cnn,
    tiny_shvit,
    tiny_vit,
)


class Attention(nn.Module):
    """Fused attention over the image's rows, with whatever options."""

    def __init__(self, mask: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(3 * SIZE, 3 * 16)
        self.options = options
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(2)
        q, k, v = self.qkv(x).reshape(x.shape[0], SIZE, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **self.options)
        return x.transpose(1, 2).flatten(2).mean(1)


class Contiguous(nn.Module):
    """A view that needs the copy before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIZE, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.transpose(1, 2).contiguous().view(x.shape[0], SIZE, 3 * SIZE)).mean(1)


class Dropped(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 10, 3), *layers)
        self.unused = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean((2, 3))


class NotTraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)) if x.sum().item() > 0 else x.sum((1, 2, 3))


class FixedBatch(nn.Module):
    """Refuses any batch but one, as windowed code that computes its batch may."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).reshape(1, 3)


@pytest.mark.parametrize("make", [tiny_cnn, tiny_vit, tiny_shvit, Contiguous])
def test_capture_equals_the_module_at_any_batch(make: Any) -> None:
    torch.manual_seed(0)
    size = 64 if make is tiny_shvit else SIZE
    module = make().eval()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = captured(module, size)
    assert model.dynamic_batch
    assert model.example.shape == (2, 3, size, size)
    with torch.no_grad():
        for count in (1, 2, 5):
            x = images(count, size)
            assert sqnr_db(module(x), model.graph_module(x)) > 110
    assert not nodes_of(model.graph_module, aten.scaled_dot_product_attention.default)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_copy_shares_no_tensor_and_no_graph() -> None:
    model = captured(tiny_cnn())
    copy = model.copy()
    x = images()
    expected = model.graph_module(x)
    with torch.no_grad():
        for parameter in copy.graph_module.parameters():
            parameter.zero_()
    for node in list(copy.graph_module.graph.nodes):
        node.meta["touched"] = True
    assert torch.equal(model.graph_module(x), expected)
    assert not any("touched" in node.meta for node in model.graph_module.graph.nodes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.7},
        {"mask": torch.linspace(-3, 3, SIZE * SIZE).reshape(1, 1, SIZE, SIZE)},
        {"mask": torch.linspace(-3, 3, SIZE * SIZE).reshape(SIZE, SIZE), "scale": 1.3},
        {"mask": torch.full((SIZE, SIZE), -math.inf).triu(1)},
    ],
    ids=["plain", "scale", "mask", "mask and scale", "minus infinity"],
)
def test_attention_is_rewritten_exactly(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = Attention(**options).double().eval()
    graph_module = captured(module.float()).graph_module
    assert not nodes_of(graph_module, aten.scaled_dot_product_attention.default)
    assert len(nodes_of(graph_module, aten.matmul.default)) == 2
    assert len(nodes_of(graph_module, aten.softmax.int)) == 1
    x = images()
    torch.testing.assert_close(graph_module(x), module(x), rtol=1e-5, atol=1e-6)
    # in float64 nothing but the order of two multiplications differs
    result = graph_module.double()(x.double())
    torch.testing.assert_close(result, module.double()(x.double()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"mask": torch.ones(SIZE, SIZE).tril().bool()}]
)
def test_other_attention_is_left_as_it_is(options: dict[str, Any]) -> None:
    module = Attention(**options).eval()
    graph_module = captured(module).graph_module
    assert len(nodes_of(graph_module, aten.scaled_dot_product_attention.default)) == 1
    torch.testing.assert_close(graph_module(images()), module(images()))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Dropout(0.5), nn.Identity()),
        (nn.Dropout(0.5, inplace=True),),
        (nn.Dropout2d(0.5), nn.AlphaDropout(0.5)),
        (nn.Dropout2d(0.5, inplace=True), nn.AlphaDropout(0.5, inplace=True)),
    ],
)
def test_dropout_and_what_nobody_uses_is_gone(layers: tuple[nn.Module, ...]) -> None:
    module = Dropped(*layers).eval()
    graph_module = captured(module).graph_module
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    assert not any("drop" in call for call in calls), calls
    assert {name for name, _ in graph_module.named_parameters()} == {
        "layers.0.weight",
        "layers.0.bias",
    }
    torch.testing.assert_close(graph_module(images()), module(images()))


def test_clean_drops_unused_tensors_and_keeps_shared_ones() -> None:
    model = captured(tiny_cnn())
    graph_module = model.graph_module
    conv = nodes_of(graph_module, aten.conv2d.default)[0]
    old = constant(graph_module, conv.args[1])
    assert old is not None
    new = add_tensor(graph_module, "stem.weight", old * 2, conv)
    assert str(new.target) == "stem_weight"
    assert str(add_tensor(graph_module, "stem.weight", old, conv).target) == "stem_weight_1"
    conv.args = (conv.args[0], new, *conv.args[2:])
    expected = set(dict(graph_module.named_parameters())) - {"stem.weight"}
    clean(graph_module)
    assert set(dict(graph_module.named_parameters())) == expected
    assert hasattr(graph_module, "stem_weight")
    assert not hasattr(graph_module, "stem_weight_1")
    assert torch.equal(model.backbone.module.stem.weight, old)
    assert torch.isfinite(graph_module(images())).all()


def test_what_cannot_be_captured_is_said_in_one_line() -> None:
    with pytest.raises(DeploykitError, match=r"can't be captured by torch\.export") as caught:
        capture(make_backbone(NotTraceable()))
    assert "\n" not in str(caught.value)


def test_a_model_of_one_batch_size_is_captured_with_it() -> None:
    model = captured(FixedBatch())
    assert not model.dynamic_batch
    assert model.graph_module(images(1)).shape == (1, 3)


def test_sqnr() -> None:
    x = torch.ones(10)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, x * 0.9) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr_db(x, x * math.nan) == -math.inf
