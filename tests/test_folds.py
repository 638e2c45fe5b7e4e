"""Folds leave the float result as it is, and say what they left alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from deploykit.graph.signal import sqnr_db
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.norm import find_norm_groups, fold_norm
from deploykit.quant.observers import Watch, collect_histograms
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.ranges import UniformRange, activation_range
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


# ── RepQ's fold of LayerNorm and GroupNorm ────────────────────────────────────────────────────


def group_norm(x: Tensor, norm: nn.Module, **convs: nn.Module) -> Tensor:
    x = norm(x.repeat(1, 4, 1, 1) * torch.linspace(0.1, 3, 12)[:, None, None])
    return sum(conv(x).mean((2, 3)) for conv in convs.values())  # type: ignore[return-value]


def layer_norm(x: Tensor, norm: nn.Module, **linears: nn.Module) -> Tensor:
    x = norm(tokens(x))
    return sum(linear(x).mean(1) for linear in linears.values())  # type: ignore[return-value]


REPQ: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Lambda(layer_norm, norm=nn.LayerNorm(96), a=nn.Linear(96, 10)),
    "several, one without bias": lambda: Lambda(
        layer_norm,
        norm=nn.LayerNorm(96),
        a=nn.Linear(96, 10),
        b=nn.Linear(96, 10, bias=False),
        c=nn.Linear(96, 10),
    ),
    "norm without bias": lambda: Lambda(
        layer_norm, norm=nn.LayerNorm(96, bias=False), a=nn.Linear(96, 10)
    ),
    "one group": lambda: Lambda(
        group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 10, 1, bias=False)
    ),
    "three groups, two convs": lambda: Lambda(
        group_norm, norm=nn.GroupNorm(3, 12), a=nn.Conv2d(12, 10, 1), b=nn.Conv2d(12, 10, 1)
    ),
}

DECLINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no affine part": (
        lambda: Lambda(
            layer_norm, norm=nn.LayerNorm(96, elementwise_affine=False), a=nn.Linear(96, 10)
        ),
        "no affine part",
    ),
    "two axes": (
        lambda: Lambda(layer_norm, norm=nn.LayerNorm((32, 96)), a=nn.Linear(96, 10)),
        "more than the channels",
    ),
    "another reader": (
        lambda: Lambda(
            lambda x, norm, a: (a(y := norm(tokens(x))) + y.mean(2, keepdim=True)).mean(1),
            norm=nn.LayerNorm(96),
            a=nn.Linear(96, 10),
        ),
        "is no linear layer",
    ),
    "second operand": (
        lambda: Lambda(
            lambda x, norm, a: (a(y := norm(tokens(x))) + 2 * torch.add(x.mean(), y)[..., :10]).sum(
                1
            ),
            norm=nn.LayerNorm(96),
            a=nn.Linear(96, 10),
        ),
        "other than as a layer's input",
    ),
    "3x3 conv": (
        lambda: Lambda(group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 10, 3)),
        "no plain 1x1",
    ),
    "padded conv": (
        lambda: Lambda(group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 10, 1, padding=1)),
        "no plain 1x1",
    ),
    "grouped conv": (
        lambda: Lambda(group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 12, 1, groups=2)),
        "no plain 1x1",
    ),
    "no conv": (
        lambda: Lambda(group_norm, norm=nn.GroupNorm(1, 12), a=nn.ReLU()),
        "no convolution",
    ),
}


def ranges_of(graph_module: fx.GraphModule, bits: int) -> UniformRange:
    (group,) = find_norm_groups(graph_module)
    watch = Watch(group.norm.name, group.channel_axis)
    histogram = collect_histograms(graph_module, [watch], lambda: [images(), images(seed=1)])[watch]
    return activation_range(histogram, bits, include_zero=False)


@pytest.mark.parametrize("name", REPQ)
def test_repq_fold_is_exact_in_float(name: str) -> None:
    torch.manual_seed(0)
    graph_module = captured(shake(REPQ[name]()).eval()).graph_module
    channels = ranges_of(graph_module, 4)
    assert channels.scale.max() > 1.5 * channels.scale.min()  # there is something to fold
    graph_module.double()
    x = images().double()
    expected = graph_module(x)
    (group,) = find_norm_groups(graph_module)
    assert group.declined is None and len(group.consumers) >= 1
    fold_norm(graph_module, group, channels, 4)
    graph_module.recompile()
    torch.testing.assert_close(graph_module(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", ["linear", "one group"])
def test_the_common_grid_is_the_channels_grids_and_has_no_code_too_many(
    name: str, bits: int
) -> None:
    """RepQ's own code leaves the zero point fractional and emits 2**bits + 1 codes."""
    graph_module = captured(shake(REPQ[name]()).eval()).graph_module
    channels = ranges_of(graph_module, bits)
    (group,) = find_norm_groups(graph_module)

    def output() -> Tensor:
        recorded = {}

        class Keep(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                result = super().run_node(n)
                recorded[n.name] = result
                return result

        Keep(graph_module).run(images())
        return recorded[group.norm.name].movedim(group.channel_axis, -1)

    before = output()
    common, zero = fold_norm(graph_module, group, channels, bits)
    graph_module.recompile()
    after = output()
    assert isinstance(zero, int) and 0 <= zero < 2**bits
    assert common == float(torch.tensor(common)) and common > 0

    quantizer = UniformQuantizer(common, zero, bits)
    sweep = torch.linspace(-(2**bits) * common * 2, 2**bits * common * 2, 20001)
    assert len(quantizer(sweep).unique()) == 2**bits
    codes = torch.round(after / common) + zero
    # the same codes as quantising every channel by itself, but where two codes meet
    alone = torch.round(before / channels.scale) + channels.zero_point
    assert (codes.clamp(0, 2**bits - 1) != alone.clamp(0, 2**bits - 1)).float().mean() < 1e-3


@pytest.mark.parametrize("name", DECLINED)
def test_repq_declines_with_a_reason(name: str) -> None:
    make, reason = DECLINED[name]
    graph_module = captured(shake(make()).eval()).graph_module
    (group,) = find_norm_groups(graph_module)
    assert group.declined is not None and reason in group.declined
    channels = UniformRange(torch.ones(12), torch.zeros(12), torch.zeros(12))
    with pytest.raises(ValueError, match=reason):
        fold_norm(graph_module, group, channels, 8)


def test_repq_fold_survives_dead_and_constant_channels() -> None:
    module = Lambda(layer_norm, norm=nn.LayerNorm(96), a=nn.Linear(96, 10))
    shake(module).eval()
    with torch.no_grad():
        module.layers["norm"].weight[:3] = 0
        module.layers["norm"].bias[:3] = torch.tensor([0.0, 2.5, -1e-6])
    graph_module = captured(module).graph_module
    expected = graph_module(images())
    channels = ranges_of(graph_module, 8)
    (group,) = find_norm_groups(graph_module)
    common, zero = fold_norm(graph_module, group, channels, 8)
    graph_module.recompile()
    assert sqnr_db(expected, graph_module(images())) > 90
    with graph_module.graph.inserting_after(group.norm):
        new = UniformQuantizer(common, zero, 8).insert(graph_module.graph, group.norm)
    for layer in group.consumers:
        layer.args = (new, *layer.args[1:])
    graph_module.recompile()
    assert sqnr_db(expected, graph_module(images())) > 30
