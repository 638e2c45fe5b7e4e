"""Histograms, activation ranges and weight scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deploykit.quant.observers import (
    CHANNEL_BINS,
    TENSOR_BINS,
    Histogram,
    Watch,
    collect_histograms,
)
from deploykit.quant.ranges import MIN_SCALE, activation_range, weight_scale
from deploykit.quant.weights import quantize_bias, quantize_weight
from tests.graphs import captured, images, nodes_of, tiny_cnn

aten = torch.ops.aten
quick = settings(max_examples=30, deadline=None)


def error_of(histogram: Histogram, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Mean squared error of each channel, computed another way."""
    centres = histogram.centres.double()
    low = -zero_point.double()[:, None] * scale.double()[:, None]
    high = low + (2**bits - 1) * scale.double()[:, None]
    step = scale.double()[:, None]
    nearest = (torch.clamp(centres, low, high) / step).round() * step
    squared = (nearest - centres).square() * histogram.counts
    return squared.sum(1) / histogram.counts.sum(1)


def histogram(rows: Tensor, bins: int = 512) -> Histogram:
    low, high = torch.aminmax(rows, dim=1)
    counts = torch.stack([torch.histc(row, bins) for row in rows])
    return Histogram(low, high, counts)


def channels(seed: int, count: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 2000, generator=generator)
    return rows * torch.logspace(-2, 2, count)[:, None] + torch.linspace(-3, 3, count)[:, None]


@given(seed=st.integers(0, 999), bits=st.integers(2, 8), zero=st.booleans())
@quick
def test_percentile_mse_is_never_worse_than_minmax(seed: int, bits: int, zero: bool) -> None:
    seen = histogram(channels(seed))
    widest = activation_range(seen, bits, "minmax", include_zero=zero)
    best = activation_range(seen, bits, "percentile-mse", include_zero=zero)
    for found in (widest, best):
        assert torch.equal(found.zero_point, found.zero_point.round())
        assert (found.scale >= MIN_SCALE).all()
        if zero:
            assert (found.zero_point >= 0).all() and (found.zero_point < 2**bits).all()
        wanted = error_of(seen, found.scale, found.zero_point, bits)
        torch.testing.assert_close(found.error, wanted, rtol=0.02, atol=1e-9)
    assert (best.error <= widest.error * (1 + 1e-5)).all()


def test_outliers_are_clipped_at_low_bits_and_kept_at_high() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(100_000, generator=generator), torch.tensor([30.0])])[None]
    seen = histogram(values, 2048)
    minmax = activation_range(seen, 4, "minmax")
    best = activation_range(seen, 4)
    assert float(best.scale[0]) < float(minmax.scale[0]) / 2
    assert float(best.error[0]) < float(minmax.error[0]) / 4


def test_minmax_covers_the_exact_extremes() -> None:
    seen = histogram(torch.tensor([[-1.0, 0.3, 4.1], [2.0, 3.0, 5.0], [-7.0, -6.0, -5.0]]))
    with_zero = activation_range(seen, 8, "minmax")
    assert torch.allclose(with_zero.scale, torch.tensor([5.1, 5.0, 7.0]) / 255)
    assert with_zero.zero_point.tolist() == [50, 0, 255]
    without = activation_range(seen, 8, "minmax", include_zero=False)
    assert torch.allclose(without.scale, torch.tensor([5.1, 3.0, 2.0]) / 255)
    assert without.zero_point.tolist() == [50, -170, 892]


def test_an_outlier_of_1e30_does_not_hide_the_rest_of_the_channels() -> None:
    rows = torch.rand(3, 100)
    rows[1, 0] = 1e30
    for include_zero in (True, False):
        found = activation_range(histogram(rows), 8, include_zero=include_zero)
        for part in (found.scale, found.zero_point, found.error):
            assert torch.isfinite(part).all()
        assert float(found.scale[0]) < 1 and float(found.scale[2]) < 1


def test_an_all_zero_channel_has_a_scale() -> None:
    rows = torch.rand(3, 100)
    rows[1] = 0
    found = activation_range(histogram(rows), 4, include_zero=False)
    assert found.scale[1] == MIN_SCALE and found.zero_point[1] == 0 and found.error[1] == 0


def test_channels_do_not_depend_on_their_neighbours() -> None:
    """They are searched in groups, to bound memory."""
    rows = channels(0, 40)
    together = activation_range(histogram(rows), 4)
    for index in (0, 15, 16, 39):
        alone = activation_range(histogram(rows[index : index + 1]), 4)
        assert alone.scale[0] == together.scale[index]
        assert alone.zero_point[0] == together.zero_point[index]


# ── histograms ────────────────────────────────────────────────────────────────────────────────


def test_histograms_hold_exact_extremes_and_every_value() -> None:
    graph_module = captured(tiny_cnn()).graph_module
    conv = nodes_of(graph_module, aten.conv2d.default)[0]
    watches = [Watch(conv.name), Watch(conv.name, 1), Watch("x")]
    seen = collect_histograms(graph_module, watches, lambda: [images(2), images(3, seed=1)])
    x = torch.cat([images(2), images(3, seed=1)])
    weight = graph_module.get_parameter(str(conv.args[1].target))
    outputs = torch.nn.functional.conv2d(x, weight, None, 2, 1)
    whole, by_channel, image = (seen[watch] for watch in watches)
    assert whole.counts.shape == (1, TENSOR_BINS) and by_channel.counts.shape == (16, CHANNEL_BINS)
    assert float(image.low[0]) == float(x.min()) and float(image.high[0]) == float(x.max())
    torch.testing.assert_close(by_channel.low, outputs.amin((0, 2, 3)))
    torch.testing.assert_close(by_channel.high, outputs.amax((0, 2, 3)))
    assert float(whole.counts.sum()) == outputs.numel()
    assert (by_channel.counts.sum(1) == outputs.numel() / 16).all()
    # the distribution: medians agree to within a bin
    middle = int((by_channel.counts[0].cumsum(0) < outputs[:, 0].numel() / 2).sum())
    width = float(by_channel.high[0] - by_channel.low[0]) / CHANNEL_BINS
    assert float(by_channel.centres[0, middle]) == pytest.approx(
        float(outputs[:, 0].median()), abs=2 * width
    )


def test_batches_add_up_to_the_whole() -> None:
    graph_module = captured(tiny_cnn()).graph_module
    watches = [Watch("x"), Watch(nodes_of(graph_module, aten.relu.default)[0].name, 1)]
    x = images(6)
    one = collect_histograms(graph_module, watches, lambda: [x])
    many = collect_histograms(graph_module, watches, lambda: [x[:1], x[1:3], x[3:]])
    for watch in watches:
        torch.testing.assert_close(one[watch].low, many[watch].low)
        torch.testing.assert_close(one[watch].high, many[watch].high)
        assert (one[watch].counts - many[watch].counts).abs().sum() <= 1e-3 * one[
            watch
        ].counts.sum()


def test_memory_does_not_grow_with_the_images_and_progress_counts_them() -> None:
    graph_module = captured(tiny_cnn()).graph_module
    watch = Watch(nodes_of(graph_module, aten.conv2d.default)[0].name, 1)
    sizes, seen = [], []
    for count in (1, 8):
        found = collect_histograms(
            graph_module, [watch], lambda count=count: (images() for _ in range(count)), seen.append
        )[watch]
        sizes.append(sum(part.numel() for part in (found.low, found.high, found.counts)))
    assert sizes[0] == sizes[1]
    assert seen == [3] * 2 * (1 + 8)


def test_a_constant_channel_is_in_one_bin() -> None:
    graph_module = captured(tiny_cnn()).graph_module
    x = torch.zeros(2, 3, 32, 32)
    x[:, 1] = 5
    found = collect_histograms(graph_module, [Watch("x", 1)], lambda: [x])[Watch("x", 1)]
    assert found.low.tolist() == found.high.tolist() == [0, 5, 0]
    assert (found.counts[:, 0] == 2 * 32 * 32).all()
    assert torch.isfinite(found.centres).all()


# ── weights ───────────────────────────────────────────────────────────────────────────────────


def weight_error(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    column = scale.reshape(-1, *[1] * (weight.ndim - 1))
    codes = torch.round(weight / column).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * column - weight).double().square().flatten(1).sum(1)


@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
@quick
def test_mse_weight_scale_is_never_worse_than_minmax(seed: int, bits: int) -> None:
    weight = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 3, 12)[:, None, None, None]
    widest = weight_scale(weight, bits, "minmax")
    assert torch.allclose(widest, weight.abs().amax((1, 2, 3)) / (2 ** (bits - 1) - 1))
    best = weight_scale(weight, bits, "mse")
    assert (weight_error(weight, best, bits) <= weight_error(weight, widest, bits) * 1.00001).all()
    if bits <= 4:
        assert weight_error(weight, best, bits).sum() < weight_error(weight, widest, bits).sum()


@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
@quick
def test_codes_are_int8_within_their_width(seed: int, bits: int) -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) * 1e3
    weight[0] = 0
    weight[1] = 1e-30
    weight[2, 0] = 1e30
    quantized = quantize_weight(weight, bits)
    assert quantized.codes.dtype == torch.int8 and quantized.codes.shape == weight.shape
    assert int(quantized.codes.min()) >= -(2 ** (bits - 1))
    assert int(quantized.codes.max()) < 2 ** (bits - 1)
    assert (quantized.codes[0] == 0).all()
    assert torch.isfinite(quantized.dequantize()).all()
    assert (quantized.scale > 0).all()


@pytest.mark.parametrize("input_scale", [1e-8, 1e-4, 1.0, 1e4])
def test_biases_fit_int32_and_are_kept_by_dead_channels(input_scale: float) -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    weight[2] = 1e-12
    bias = torch.tensor([1.0, -2.5, 3.0, 0.0])
    quantized = quantize_weight(weight, 8, bias=bias, input_scale=input_scale)
    codes = quantize_bias(bias, input_scale, quantized)
    assert codes.codes.dtype == torch.int32
    assert int(codes.codes.abs().max()) <= 2**30
    # rounding errs by half a step of the accumulator's grid, and clipping never bites
    error = (codes.codes.double() * codes.scale.double() - bias.double()).abs()
    assert (error <= codes.scale.double() * 0.5001 + bias.abs() * 1e-6).all()
    if input_scale <= 1:
        assert codes.codes[1] * codes.scale[1] == pytest.approx(-2.5, rel=1e-6)
