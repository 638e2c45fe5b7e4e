"""Folds of BatchNorm leave the float result as it is, and say what they left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from deploykit.graph.signal import sqnr_db
from deploykit.quant.folds.batch_norm import fold_batch_norm
from tests.graphs import SIZE, aten, captured, images, nodes_of, shake, tiny_cnn, tiny_shvit


class Lambda(nn.Module):
    """Named layers and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **self.layers)


def conv_norm(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
    return norm(conv(x)).mean((2, 3))


def features(x: Tensor) -> Tensor:
    return x.mean(3).flatten(1)  # (N, 96)


def tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # (N, 32, 96)


def levit(x: Tensor, linear: nn.Module, norm: nn.Module) -> Tensor:
    y = linear(tokens(x))
    return norm(y.flatten(0, 1)).reshape_as(y).mean(1)


FOLDABLE: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: Lambda(conv_norm, conv=nn.Conv2d(3, 10, 3), norm=nn.BatchNorm2d(10)),
    "padded strided conv without bias": lambda: Lambda(
        conv_norm, conv=nn.Conv2d(3, 10, 3, 2, 1, bias=False), norm=nn.BatchNorm2d(10)
    ),
    "same conv": lambda: Lambda(
        conv_norm, conv=nn.Conv2d(3, 10, 3, padding="same"), norm=nn.BatchNorm2d(10)
    ),
    "depthwise conv": lambda: Lambda(
        conv_norm, conv=nn.Conv2d(3, 9, 3, groups=3), norm=nn.BatchNorm2d(9)
    ),
    "norm without affine part": lambda: Lambda(
        conv_norm, conv=nn.Conv2d(3, 10, 3), norm=nn.BatchNorm2d(10, affine=False)
    ),
    "linear": lambda: Lambda(
        lambda x, linear, norm: norm(linear(features(x))),
        linear=nn.Linear(96, 10),
        norm=nn.BatchNorm1d(10),
    ),
    "norm before linear": lambda: Lambda(
        lambda x, linear, norm: linear(norm(features(x))),
        linear=nn.Linear(96, 10),
        norm=nn.BatchNorm1d(96),
    ),
    "norm before 1x1 conv": lambda: Lambda(
        lambda x, conv, norm: conv(norm(x)).mean((2, 3)),
        conv=nn.Conv2d(3, 10, 1, stride=2, bias=False),
        norm=nn.BatchNorm2d(3),
    ),
    "linear on tokens": lambda: Lambda(
        levit, linear=nn.Linear(96, 10, bias=False), norm=nn.BatchNorm1d(10)
    ),
}

KEPT: dict[str, Callable[[], nn.Module]] = {
    "output with two users": lambda: Lambda(
        lambda x, conv, norm: (norm(y := conv(x)) + y).mean((2, 3)),
        conv=nn.Conv2d(3, 10, 3),
        norm=nn.BatchNorm2d(10),
    ),
    "norm before padded conv": lambda: Lambda(
        lambda x, conv, norm: conv(norm(x)).mean((2, 3)),
        conv=nn.Conv2d(3, 10, 1, padding=1),
        norm=nn.BatchNorm2d(3),
    ),
    "norm before 3x3 conv": lambda: Lambda(
        lambda x, conv, norm: conv(norm(x)).mean((2, 3)),
        conv=nn.Conv2d(3, 10, 3),
        norm=nn.BatchNorm2d(3),
    ),
    "norm before conv and something else": lambda: Lambda(
        lambda x, conv, norm: conv(y := norm(x)).mean((2, 3)) + y.mean((1, 2, 3))[:, None],
        conv=nn.Conv2d(3, 10, 1),
        norm=nn.BatchNorm2d(3),
    ),
    "norm over positions": lambda: Lambda(
        lambda x, linear, norm: norm(linear(tokens(x))).mean(1),
        linear=nn.Linear(96, 10),
        norm=nn.BatchNorm1d(SIZE),
    ),
    "as many positions as channels": lambda: Lambda(
        lambda x, linear, norm: norm(linear(tokens(x))).mean(1),
        linear=nn.Linear(96, SIZE),
        norm=nn.BatchNorm1d(SIZE),
    ),
    "batch statistics": lambda: Lambda(
        conv_norm, conv=nn.Conv2d(3, 10, 3), norm=nn.BatchNorm2d(10, track_running_stats=False)
    ),
}


def folded(module: nn.Module, size: int = SIZE) -> tuple[fx.GraphModule, object]:
    graph_module = captured(module, size).graph_module
    return graph_module, fold_batch_norm(graph_module)


@pytest.mark.parametrize("name", FOLDABLE)
def test_batch_norm_is_folded_exactly(name: str) -> None:
    torch.manual_seed(0)
    module = shake(FOLDABLE[name]()).double().float().eval()
    graph_module, report = folded(module)
    assert report.folded == 1 and not report.kept
    assert not nodes_of(graph_module, aten.batch_norm.default)
    assert not any("running" in name for name, _ in graph_module.named_buffers())
    assert sqnr_db(module(images()), graph_module(images())) > 120


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_is_exact_in_double(name: str) -> None:
    """Folded in float64 throughout, nothing but float64's round-off is left."""
    torch.manual_seed(0)
    module = shake(FOLDABLE[name]()).eval()
    graph_module = captured(module).graph_module.double()
    x = images().double()
    expected = graph_module(x)
    fold_batch_norm(graph_module)
    torch.testing.assert_close(graph_module(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KEPT)
def test_batch_norm_that_cannot_be_folded_is_kept_with_a_reason(name: str) -> None:
    torch.manual_seed(0)
    module = shake(KEPT[name]()).eval()
    graph_module, report = folded(module)
    assert report.folded == 0
    assert list(report.kept) == ["layers.norm"] and report.kept["layers.norm"]
    assert len(nodes_of(graph_module, aten.batch_norm.default)) == 1
    torch.testing.assert_close(graph_module(images()), module(images()))


def test_a_conv_used_twice_with_different_norms_is_not_corrupted() -> None:
    def function(x: Tensor, conv: nn.Module, one: nn.Module, two: nn.Module) -> Tensor:
        return (one(conv(x)) + two(conv(x * 2))).mean((2, 3))

    module = Lambda(
        function, conv=nn.Conv2d(3, 10, 3), one=nn.BatchNorm2d(10), two=nn.BatchNorm2d(10)
    )
    shake(module).eval()
    weight = module.layers["conv"].weight.clone()
    graph_module, report = folded(module)
    assert report.folded == 2
    assert sqnr_db(module(images()), graph_module(images())) > 120
    assert torch.equal(module.layers["conv"].weight, weight)


def test_every_batch_norm_of_shvit_goes() -> None:
    module = tiny_shvit()
    model = captured(module, 64)
    expected = model.graph_module(images(2, 64))
    count = len(nodes_of(model.graph_module, aten.batch_norm.default))
    report = fold_batch_norm(model.graph_module)
    assert report.folded == count > 70 and not report.kept
    assert not nodes_of(model.graph_module, aten.batch_norm.default)
    assert sqnr_db(expected, model.graph_module(images(2, 64))) > 100


def test_the_tiny_cnn_loses_all_three() -> None:
    graph_module, report = folded(tiny_cnn())
    assert report.folded == 3
    assert not nodes_of(graph_module, aten.batch_norm.default)
