"""Folds of LayerNorm and GroupNorm leave the float result, and candidates are the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from deploykit._compat import timm
from deploykit.graph.edit import constant
from deploykit.graph.signal import sqnr_db
from deploykit.quant.folds.batch_norm import fold_batch_norm
from deploykit.quant.folds.norm import (
    apply_norm_fold,
    consumer_absmax,
    find_norm_groups,
    fold_norm,
    repq_candidate,
)
from deploykit.quant.folds.smooth import smooth_candidate
from deploykit.quant.observers import Watch, collect_histograms
from deploykit.quant.quantizers.uniform import UniformQuantizer
from deploykit.quant.ranges import UniformRange, activation_range
from tests.graphs import aten, captured, images, nodes_of, shake
from tests.test_folds import Lambda, tokens

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
    "norm without affine part": lambda: Lambda(
        layer_norm, norm=nn.LayerNorm(96, elementwise_affine=False), a=nn.Linear(96, 10)
    ),
    "group norm without affine part": lambda: Lambda(
        group_norm, norm=nn.GroupNorm(3, 12, affine=False), a=nn.Conv2d(12, 10, 1)
    ),
    "3x3 conv without padding": lambda: Lambda(
        group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 10, 3, stride=2)
    ),
    "grouped convs": lambda: Lambda(
        group_norm,
        norm=nn.GroupNorm(1, 12),
        a=nn.Conv2d(12, 12, 2, groups=2, bias=False),
        b=nn.Conv2d(12, 12, 3, groups=12),
    ),
    "one group": lambda: Lambda(
        group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 10, 1, bias=False)
    ),
    "three groups, two convs": lambda: Lambda(
        group_norm, norm=nn.GroupNorm(3, 12), a=nn.Conv2d(12, 10, 1), b=nn.Conv2d(12, 10, 1)
    ),
}

DECLINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
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
        "add reads it",
    ),
    "a layer's weight": (
        lambda: Lambda(
            lambda x, norm: torch.nn.functional.linear(x.new_ones(1, 96), norm(tokens(x))[0]),
            norm=nn.LayerNorm(96),
        ),
        "select reads it",
    ),
    "padded 3x3 conv": (
        lambda: Lambda(group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 10, 3, padding=1)),
        "pads zeros",
    ),
    "padded 1x1 conv": (
        lambda: Lambda(group_norm, norm=nn.GroupNorm(1, 12), a=nn.Conv2d(12, 10, 1, padding=1)),
        "pads zeros",
    ),
    "no conv": (
        lambda: Lambda(group_norm, norm=nn.GroupNorm(1, 12), a=nn.ReLU()),
        "relu reads it and is no linear layer or convolution",
    ),
}


def ranges_of(graph_module: fx.GraphModule, bits: int) -> UniformRange:
    (group,) = find_norm_groups(graph_module)
    watch = Watch(group.norm.name, group.channel_axis)
    histogram = collect_histograms(graph_module, [watch], lambda: [images(), images(seed=1)])[watch]
    return activation_range(histogram, bits, include_zero=False)


def values_of(graph_module: fx.GraphModule, x: Tensor) -> dict[str, Tensor]:
    recorded = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            recorded[n.name] = result
            return result

    Keep(graph_module).run(x)
    return recorded


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
        value = values_of(graph_module, images())[group.norm.name]
        return value.movedim(group.channel_axis, -1)

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


# ── Through moves, and which ratio and shift ──────────────────────────────────────────────────

TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}

# name: (module, image side, norms, foldable where their readers must read them directly, and
# through moves)
MOVED: dict[str, tuple[Callable[[], nn.Module], int, int, int, int]] = {
    "registers": (
        lambda: timm.models.VisionTransformer(
            **TINY_VIT, num_classes=10, reg_tokens=2, init_values=0.1
        ),
        32, 3, 2, 3,
    ),
    "two tokens to two heads": (
        lambda: timm.create_model(
            "deit_tiny_distilled_patch16_224", num_classes=10, **TINY_VIT
        ),
        32, 3, 2, 3,
    ),
    "q/k-norm stays": (
        lambda: timm.models.VisionTransformer(**TINY_VIT, num_classes=10, qk_norm=True),
        32, 5, 2, 3,
    ),
    "shifted windows": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16,
            depths=(2, 1), num_heads=(2, 4), num_classes=10,
        ),
        32, 9, 4, 8,
    ),
    "channels first and last": (
        lambda: timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 12, 16, 20), num_classes=10),
        64, 9, 4, 8,
    ),
    "mean of the tokens": (
        lambda: Lambda(
            lambda x, norm, a: a(norm(tokens(x)).mean(1)), norm=nn.LayerNorm(96),
            a=nn.Linear(96, 10),
        ),
        32, 1, 0, 1,
    ),
    "joined with something else": (
        lambda: Lambda(
            lambda x, norm, a: a(torch.cat([tokens(x), norm(tokens(x))], 2)).mean(1),
            norm=nn.LayerNorm(96), a=nn.Linear(192, 10),
        ),
        32, 1, 0, 1,
    ),
    "half of the channels": (
        lambda: Lambda(
            lambda x, norm, a, b: (a((y := norm(tokens(x)))[..., 40:]) + b(y.flip(2))).mean(1),
            norm=nn.LayerNorm(96), a=nn.Linear(56, 10), b=nn.Linear(96, 10),
        ),
        32, 1, 0, 1,
    ),
    "mean of the channels stays": (
        lambda: Lambda(
            lambda x, norm, a: a(norm(tokens(x)).mean(2)), norm=nn.LayerNorm(96),
            a=nn.Linear(32, 10),
        ),
        32, 1, 0, 0,
    ),
    "linear over the tokens stays": (
        lambda: Lambda(
            lambda x, norm, a: a(norm(tokens(x)).transpose(1, 2)).mean(1), norm=nn.LayerNorm(96),
            a=nn.Linear(32, 10),
        ),
        32, 1, 0, 0,
    ),
    "a ReLU before the reader stays": (
        lambda: Lambda(
            lambda x, norm, a: a(norm(tokens(x)).relu()).mean(1), norm=nn.LayerNorm(96),
            a=nn.Linear(96, 10),
        ),
        32, 1, 0, 0,
    ),
    "zeros around the tokens stay": (
        lambda: Lambda(
            lambda x, norm, a: a(nn.functional.pad(norm(tokens(x)), (0, 0, 1, 1))).mean(1),
            norm=nn.LayerNorm(96), a=nn.Linear(96, 10),
        ),
        32, 1, 0, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_norms_are_followed_through_moves_and_folded_exactly(name: str) -> None:
    make, size, norms, direct, moved = MOVED[name]
    torch.manual_seed(0)
    graph_module = captured(shake(make()), size).graph_module
    x = images(2, size)
    expected = graph_module(x)
    assert sum(g.declined is None for g in find_norm_groups(graph_module)) == direct
    groups = find_norm_groups(graph_module, through_moves=True)
    assert len(groups) == norms
    folded = [group for group in groups if group.declined is None]
    assert len(folded) == moved
    assert all(group.declined for group in groups if group not in folded)
    for group in folded:
        channels = group.norm.args[1][0]
        ratio = torch.rand(channels).mul(4).sub(2).exp2()  # 1/4 to 4
        apply_norm_fold(graph_module, group, ratio, torch.randn(channels))
    # Only the weights are rounded once more; a channel at the wrong column is off by far more.
    result = graph_module(x)
    assert float((result - expected).abs().max() / expected.abs().max()) < 2e-5


def test_what_a_folded_norms_readers_read_is_told() -> None:
    graph_module = captured(shake(MOVED["two tokens to two heads"][0]())).graph_module
    group = find_norm_groups(graph_module, through_moves=True)[-1]
    assert [node.name for node in group.inputs] == ["select", "select_1"]
    assert all(node is not group.norm for node in group.inputs)
    assert [columns.tolist() for columns in group.columns] == [list(range(32))] * 2


def test_a_folded_norm_gives_the_shifted_and_scaled_output() -> None:
    graph_module = captured(shake(REPQ["several, one without bias"]())).graph_module.double()
    (group,) = find_norm_groups(graph_module)
    ratio = torch.linspace(0.5, 4, 96, dtype=torch.float64)
    shift = torch.linspace(-3, 2, 96, dtype=torch.float64)
    x = images().double()
    before = values_of(graph_module, x)[group.norm.name]
    weights = [constant(graph_module, layer.args[1]) for layer in group.consumers]
    absmax = consumer_absmax(graph_module, group)
    assert torch.equal(absmax, torch.cat([w.abs() for w in weights]).amax(0))
    apply_norm_fold(graph_module, group, ratio, shift)
    after = values_of(graph_module, x)[group.norm.name]
    torch.testing.assert_close(after, (before + shift) / ratio)
    for layer, old in zip(group.consumers, weights, strict=True):
        torch.testing.assert_close(constant(graph_module, layer.args[1]), old * ratio)
    with pytest.raises(ValueError, match="positive"):
        apply_norm_fold(graph_module, group, ratio * 0, shift)
    with pytest.raises(ValueError, match="96 ratios"):
        apply_norm_fold(graph_module, group, ratio[:1], shift[:1])


def test_weights_of_channels_that_nothing_reads_count_as_zero() -> None:
    module = Lambda(
        lambda x, norm, a: a(norm(tokens(x))[..., :40]).mean(1),
        norm=nn.LayerNorm(96),
        a=nn.Linear(40, 10),
    )
    graph_module = captured(shake(module)).graph_module
    (group,) = find_norm_groups(graph_module, through_moves=True)
    absmax = consumer_absmax(graph_module, group)
    assert absmax.shape == (96,) and bool((absmax[:40] > 0).all())
    assert not absmax[40:].any()


def channels_of(scale: list[float], zero_point: list[float]) -> UniformRange:
    return UniformRange(torch.tensor(scale), torch.tensor(zero_point), torch.zeros(len(scale)))


def test_repq_candidates_are_the_papers_formulas() -> None:
    channels = channels_of([1.0, 2.0, 2.5, 6.5], [3.0, 8.0, 7.0, 9.0])
    mean = repq_candidate(channels, 4)
    assert mean.name == "repq-mean" and mean.scale == 3.0 and mean.zero_point == 7  # 6.75
    torch.testing.assert_close(mean.ratio, channels.scale.double() / 3)
    torch.testing.assert_close(mean.shift, torch.tensor([-4.0, 2, 0, 13]).double())
    median = repq_candidate(channels, 4, "median")
    assert median.scale == 2.0 and median.zero_point == 7
    torch.testing.assert_close(median.ratio, channels.scale.double() / 2)
    assert repq_candidate(channels_of([1.0, 1.0], [40.0, 30.0]), 4).zero_point == 15


def test_clipping_bounds_a_wide_channel_and_keeps_its_middle() -> None:
    scale = [1.0, 1.25, 1.5, 1.75, 2.0, 40.0]
    candidate = repq_candidate(channels_of(scale, [7.0] * 5 + [11.0]), 4, "clipped")
    values = torch.tensor(scale).double()
    first, third = torch.quantile(values, torch.tensor([0.25, 0.75]).double())
    bound = third + 1.5 * (third - first)
    clipped = values.clamp(max=bound)
    assert candidate.scale == pytest.approx(float(clipped.mean()))
    torch.testing.assert_close(candidate.ratio, clipped / candidate.scale)
    # the middle of the wide channel's range, 40 (7.5 - 11), still lies in the middle of the codes
    code = ((40 * (7.5 - 11) + candidate.shift[-1]) / candidate.ratio[-1]) / candidate.scale
    assert float(code) + candidate.zero_point == pytest.approx(7.5, abs=0.5)


def test_smooth_candidates_are_the_papers_formula() -> None:
    low, high = torch.tensor([-4.0, 1.0, 0.0, -2.0]), torch.tensor([2.0, 3.0, 0.0, 16.0])
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    plain = smooth_candidate(low, high, weights, 0.5, shift=False)
    assert plain.shift.tolist() == [0.0] * 4 and plain.scale is None
    torch.testing.assert_close(plain.ratio, torch.tensor([4.0 / 1, 3 / 0.5, 1, 1]).double().sqrt())
    shifted = smooth_candidate(low, high, weights, 0.95, shift=True)
    assert shifted.shift.tolist() == [1.0, -2.0, 0.0, -7.0]
    expected = torch.tensor([3**0.95, 1 / 0.5**0.05, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(shifted.ratio, expected)
    # every channel is symmetric now
    torch.testing.assert_close(low + shifted.shift, -(high + shifted.shift), check_dtype=False)
    with pytest.raises(ValueError, match="alpha"):
        smooth_candidate(low, high, weights, 1.5, shift=False)
    with pytest.raises(ValueError, match="finite"):
        smooth_candidate(low, high / 0, weights, 0.5, shift=False)


def test_biases_made_from_constants_are_computed_once_and_not_lost() -> None:
    """EVA joins the biases of q, k and v; a fold that took the join for no bias lost them."""
    module = timm.create_model("eva02_tiny_patch14_224", num_classes=10, **TINY_VIT)
    graph_module = captured(shake(module)).graph_module
    x = images()
    expected = graph_module(x)
    assert len(nodes_of(graph_module, aten.cat.default)) > 2
    assert sum(g.declined is None for g in find_norm_groups(graph_module)) == 2
    fold_batch_norm(graph_module)
    groups = find_norm_groups(graph_module)
    assert [group.declined for group in groups] == [None] * 3
    for group in groups:
        channels = group.norm.args[1][0]
        apply_norm_fold(graph_module, group, torch.ones(channels) * 2, torch.ones(channels))
    assert float((graph_module(x) - expected).abs().max() / expected.abs().max()) < 2e-5


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
