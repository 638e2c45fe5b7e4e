"""Cross-layer equalisation gives neighbours one range and leaves the result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from deploykit._compat import timm
from deploykit.graph.edit import constant
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.equalize import EqualizeReport, equalize_layers
from tests.graphs import aten, captured, images, nodes_of, shake

# Weights are computed in float64 and rounded to float32 once more: a few of its epsilons.
EXACT = 1e-5
# Deep networks of random weights magnify any rounding (this MobileNetV2 in float32 is 18 % off
# itself in float64), so they are compared in float64.
EXACT_DOUBLE = 1e-8


def equalized(
    module: nn.Module, *, double: bool = False
) -> tuple[fx.GraphModule, EqualizeReport, float]:
    """The equalised graph and its largest difference from before, beside the largest value."""
    graph_module = captured(module).graph_module
    fold_batch_norm(graph_module)
    x = images(2)
    if double:
        graph_module, x = graph_module.double(), x.double()
    expected = graph_module(x)
    report = equalize_layers(graph_module)
    result = graph_module(x)
    return graph_module, report, float((result - expected).abs().max() / expected.abs().max())


def layer_weights(graph_module: fx.GraphModule) -> list[Tensor]:
    layers = nodes_of(graph_module, aten.conv2d.default, aten.linear.default)
    return [constant(graph_module, node.args[1]) for node in layers]  # type: ignore[misc]


def chain(*between: nn.Module) -> nn.Module:
    """Dense, depthwise and 1x1 convolutions and a linear layer, one module between each two."""
    layers = [
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 12, 1),
    ]  # fmt: skip
    modules: list[nn.Module] = []
    for layer, after in zip(layers, between, strict=True):
        modules += [layer, after]
    return shake(nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)))


def spread(module: nn.Module) -> nn.Module:
    """Every output channel of every convolution wider or narrower, by up to 2**4."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight *= torch.rand(len(layer.weight), 1, 1, 1, generator=generator) * 8 - 4
    return module.eval()


def test_one_pair_takes_the_papers_factor() -> None:
    """s = sqrt(r1 / r2): rows and columns both come to sqrt(r1 r2)."""
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 10, 1), nn.Flatten(2))
    with torch.no_grad():
        module[0].weight[:, :, 0, 0] = torch.tensor([[8.0, -1, 2], [0.5, 0.25, 0]])
        module[0].bias[:] = torch.tensor([4.0, -1.0])
        module[2].weight.zero_()
        module[2].weight[4, :, 0, 0] = torch.tensor([-0.5, 2.0])
        module[2].weight[7, :, 0, 0] = torch.tensor([0.25, -8.0])
    graph_module = captured(module).graph_module
    report = equalize_layers(graph_module)
    assert report.pairs == (("conv2d", "conv2d_1"),)
    first, second = layer_weights(graph_module)
    s = torch.tensor([4.0, 0.25])  # sqrt(8 / 0.5), sqrt(0.5 / 8)
    wanted = torch.tensor([[8.0, -1, 2], [0.5, 0.25, 0]]) / s[:, None]
    torch.testing.assert_close(first[:, :, 0, 0], wanted)
    torch.testing.assert_close(second[4, :, 0, 0], torch.tensor([-0.5, 2.0]) * s)
    assert first.abs().amax((1, 2, 3)).tolist() == [2.0, 2.0]
    assert second.abs().amax((0, 2, 3)).tolist() == [2.0, 2.0]
    conv = nodes_of(graph_module, aten.conv2d.default)[0]
    torch.testing.assert_close(constant(graph_module, conv.args[2]), torch.tensor([1.0, -4.0]))
    assert report.largest_factor == pytest.approx(4.0)


def test_a_chain_through_a_depthwise_convolution_comes_to_equal_ranges() -> None:
    module = spread(chain(nn.ReLU(), nn.Identity(), nn.LeakyReLU(0.1)))
    graph_module, report, error = equalized(module)
    assert error < EXACT
    assert len(report.pairs) == 3 and report.sweeps > 2  # the middle ones pull at each other
    assert set(report.declined) == {"linear"}
    dense, depthwise, narrow, linear = layer_weights(graph_module)
    ranges = [
        (dense.abs().amax((1, 2, 3)), depthwise.abs().amax((1, 2, 3))),
        (depthwise.abs().amax((1, 2, 3)), narrow.abs().amax((0, 2, 3))),
        (narrow.abs().amax((1, 2, 3)), linear.abs().amax(0)),
    ]
    for rows, columns in ranges:
        torch.testing.assert_close(rows, columns, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.ReLU6(), "hardtanh stands between"),
        (nn.Hardtanh(0, 6), "hardtanh stands between"),
        (nn.GELU(), "gelu stands between"),
        (nn.Hardswish(), "hardswish stands between"),
        (nn.Softmax(1), "softmax stands between"),
    ],
)
def test_what_does_not_scale_is_declined(between: nn.Module, reason: str) -> None:
    module = spread(chain(between, nn.ReLU(), nn.ReLU()))
    graph_module, report, error = equalized(module)
    assert error < EXACT
    assert report.declined["conv2d"] == reason
    assert [first for first, _ in report.pairs] == ["conv2d_1", "conv2d_2"]
    # the first layer's weights are the ones that were captured
    assert torch.equal(layer_weights(graph_module)[0], module[0].weight)


class Branches(nn.Module):
    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.three, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 10)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return self.head(self.join(y, self.two, self.three).mean((2, 3)))


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (lambda y, two, three: two(y) + three(y), "read 2 times"),
        (lambda y, two, three: three(two(y.relu()) + y), "read 2 times"),
        (lambda y, two, three: three(two(y + 1)), "added to something else"),
    ],
)
def test_an_output_read_elsewhere_is_declined(join: Callable[..., Tensor], reason: str) -> None:
    module = shake(Branches(join))
    graph_module, report, error = equalized(module)
    assert error < EXACT
    assert reason in report.declined["conv2d"]
    assert "conv2d" not in {first for first, _ in report.pairs}
    assert torch.equal(layer_weights(graph_module)[0], module.one.weight)


def test_dead_channels_take_no_factor() -> None:
    """EfficientNet-Lite0 has depthwise channels of zeros whose biases are not zero."""
    module = spread(chain(nn.ReLU(), nn.ReLU(), nn.ReLU()))
    with torch.no_grad():
        module[0].weight[1] = 0  # a dead row
        module[2].weight[2] = 0  # a dead depthwise channel: row and column
        module[2].weight[3] *= 1e-9
        module[4].weight[:, 4] = 0  # a dead column
        module[4].weight[:] *= torch.linspace(1, 2, 12)[:, None, None, None]
    before = [module[0].bias.clone(), module[2].bias.clone()]
    graph_module, report, error = equalized(module)
    assert error < EXACT
    for tensor in graph_module.buffers():
        assert bool(torch.isfinite(tensor).all())
    convs = nodes_of(graph_module, aten.conv2d.default)
    first, depthwise = (constant(graph_module, conv.args[2]) for conv in convs[:2])
    # both pairs of the first convolution's channel 1 and of the depthwise one's 2 stay
    assert torch.equal(first[[1, 2, 3]], before[0][[1, 2, 3]])
    assert torch.equal(depthwise[[2, 3, 4]], before[1][[2, 3, 4]])
    assert report.largest_factor < 100


def test_a_layer_of_zeros_alone_is_left() -> None:
    module = spread(chain(nn.ReLU(), nn.ReLU(), nn.ReLU()))
    with torch.no_grad():
        module[2].weight.zero_()
    graph_module, _, error = equalized(module)
    assert error < EXACT
    assert not any(torch.isnan(tensor).any() for tensor in graph_module.buffers())


def test_mobilenet_v2() -> None:
    module = timm.create_model("mobilenetv2_035", num_classes=10)
    graph_module, report, error = equalized(spread(shake(module)), double=True)
    assert error < EXACT_DOUBLE
    # ReLU6 follows every expansion and depthwise layer; projections without a residual end in
    # nothing, and alone can be equalised
    assert set(report.declined.values()) >= {"hardtanh stands between"}
    assert report.pairs and len(report.pairs) + len(report.declined) == len(
        nodes_of(graph_module, aten.conv2d.default, aten.linear.default)
    )


def test_mobilenet_v2_with_relu_has_all_its_pairs() -> None:
    module = timm.create_model("mobilenetv2_035", num_classes=10, act_layer=nn.ReLU)
    _, report, error = equalized(spread(shake(module)), double=True)
    assert error < EXACT_DOUBLE
    assert not any("stands between" in reason for reason in report.declined.values())
    assert len(report.pairs) > 35


def test_resnet() -> None:
    module = timm.models.ResNet(
        timm.models.resnet.Bottleneck, layers=(1, 1, 2, 1), num_classes=10, channels=(8, 12, 16, 20)
    )
    _, report, error = equalized(spread(shake(module)), double=True)
    assert error < EXACT_DOUBLE
    assert len(report.pairs) == 2 * 5  # within each bottleneck; what meets a residual stays


def test_weights_shared_between_layers_stay_apart() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten(2))
    shake(module)
    module[2].weight = module[0].weight
    weight = module[0].weight.clone()
    _, report, error = equalized(module)
    assert error < EXACT and len(report.pairs) == 1
    assert torch.equal(module[0].weight, weight)
