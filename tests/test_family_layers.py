"""Shared layers of own families against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deploykit.backbones.layers.dft import RealFourier2d
from deploykit.backbones.layers.reparam import fold_batchnorm, spread_kernel
from deploykit.backbones.layers.selective_scan import (
    draw_scan_parameters,
    linear_recurrence,
    selective_scan,
)
from deploykit.backbones.layers.sizes import check_side, to_map, to_tokens
from deploykit.backbones.layers.windows import cut_windows, join_windows
from deploykit.errors import UsageError


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (5, 8), (1, 2)])
def test_the_transform_is_torchs(height: int, width: int) -> None:
    fourier = RealFourier2d(height, width)
    image = torch.randn(2, 3, height, width)
    wanted = torch.fft.rfft2(image, norm="ortho")
    real, imag = fourier.transform(image)
    torch.testing.assert_close(torch.complex(real, imag), wanted, rtol=1e-5, atol=1e-5)
    spectrum = torch.randn_like(wanted)  # of no real image: what a learned filter leaves
    back = torch.fft.irfft2(spectrum, s=(height, width), norm="ortho")
    torch.testing.assert_close(
        fourier.inverse(spectrum.real, spectrum.imag), back, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("length", [1, 2, 3, 16, 49])
def test_doubling_is_the_recurrence(length: int) -> None:
    a, b = torch.rand(2, 3, length), torch.randn(2, 3, length)
    state, states = torch.zeros(2, 3), []
    for t in range(length):
        state = a[..., t] * state + b[..., t]
        states.append(state)
    torch.testing.assert_close(linear_recurrence(a, b), torch.stack(states, -1))


def test_the_selective_scan_is_mambas_loop() -> None:
    n, k, d, s, length = 2, 4, 6, 3, 13
    x, step = torch.randn(n, k, d, length), torch.rand(n, k, d, length)
    a, skip = -torch.rand(k, d, s), torch.randn(k, d)
    b, c = torch.randn(n, k, s, length), torch.randn(n, k, s, length)
    state = torch.zeros(n, k, d, s)
    outs = []
    for t in range(length):
        dt = step[..., t].unsqueeze(-1)
        state = torch.exp(dt * a) * state + dt * b[..., t].unsqueeze(2) * x[..., t].unsqueeze(-1)
        outs.append((state * c[..., t].unsqueeze(2)).sum(-1) + skip * x[..., t])
    got = selective_scan(x, step, a, b, c, skip)
    torch.testing.assert_close(got, torch.stack(outs, -1), rtol=1e-4, atol=1e-5)


def test_fresh_scans_step_between_a_thousandth_and_a_tenth() -> None:
    shapes = ((4, 9, 32), (4, 32, 3), (4, 32), (128, 5))
    x_proj, weight, bias, a_logs = (torch.empty(shape) for shape in shapes)
    draw_scan_parameters(x_proj, weight, bias, a_logs)
    step = F.softplus(bias)
    assert 0.001 <= step.min() < step.max() <= 0.1001
    assert torch.allclose(a_logs.exp(), torch.arange(1.0, 6).expand(128, 5))
    assert x_proj.abs().max() <= 32**-0.5 and x_proj.std() > 0.1


def test_windows_are_cut_and_joined() -> None:
    image = torch.arange(2 * 4 * 6).float().view(2, 4, 6, 1)
    windows = cut_windows(image, (2, 3))
    assert windows.shape == (8, 2, 3, 1)
    assert torch.equal(windows[1], image[0, 0:2, 3:6])  # row by row of windows
    assert torch.equal(windows[2], image[0, 2:4, 0:3])
    assert torch.equal(windows[4], image[1, 0:2, 0:3])
    assert torch.equal(join_windows(windows, (4, 6)), image)


def test_tokens_are_the_map_row_by_row() -> None:
    image = torch.randn(2, 3, 4, 5)
    tokens = to_tokens(image)
    assert torch.equal(tokens[:, 7], image[:, :, 1, 2])
    assert torch.equal(to_map(tokens, 4, 5), image)


def test_batchnorm_folds_into_what_is_before_it() -> None:
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6).eval()
    assert norm.running_mean is not None and norm.running_var is not None
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    image = torch.randn(2, 4, 8, 8)
    weight, bias = fold_batchnorm(conv.weight, conv.bias, norm)
    torch.testing.assert_close(F.conv2d(image, weight, bias), norm(conv(image)))
    weight, bias = fold_batchnorm(conv.weight, None, norm)
    wanted = norm(F.conv2d(image, conv.weight))
    torch.testing.assert_close(F.conv2d(image, weight, bias), wanted)


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 5), (5, 1), (7, 2)])
def test_a_dilated_kernel_is_a_dense_one_with_zeros(kernel: int, dilation: int) -> None:
    weight, image = torch.randn(4, 1, kernel, kernel), torch.randn(1, 4, 20, 20)
    pad = dilation * (kernel - 1) // 2
    wanted = F.conv2d(image, weight, padding=pad, dilation=dilation, groups=4)
    dense = spread_kernel(weight, dilation, 13)
    assert dense.shape == (4, 1, 13, 13)
    torch.testing.assert_close(F.conv2d(image, dense, padding=6, groups=4), wanted)


@pytest.mark.parametrize("side", [0, 31, 200])
def test_a_size_that_does_not_fit_is_one_line(side: int) -> None:
    with pytest.raises(UsageError, match=rf"multiple of 32 pixels, not {side}: use \d+ or \d+"):
        check_side("Some net", side)
    assert check_side("Some net", 224) == 224
