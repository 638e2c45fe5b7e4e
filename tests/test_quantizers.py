"""Each activation quantiser against its paper, and the arithmetic against ONNX's words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploykit.graph.ops import (
    dequantize,
    fake_quantize,
    fake_quantize_log,
    fake_quantize_twin,
    log_codes,
    quantize_codes,
)
from deploykit.quant.quantizers import get_quantizer, list_quantizers, register_quantizer
from deploykit.quant.quantizers.adalog import adalog_fractions
from deploykit.quant.quantizers.registry import FittedQuantizer
from tests.histograms import METHODS, fit, takes, values_of

BITS = st.integers(2, 8)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
SCALES = st.floats(2.0**-27, 2.0**27, width=32)
every_quantizer = pytest.mark.parametrize("name", list_quantizers())
quick = settings(max_examples=40, deadline=None)


@every_quantizer
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(100),
        torch.full((100,), 3.0),
        torch.full((100,), 1e-30),
        torch.full((100,), 1e30),
        torch.cat([torch.rand(999), torch.tensor([1e30])]),
        torch.cat([torch.zeros(999), torch.tensor([1e-30])]),
        torch.cat([torch.rand(999), torch.tensor([1e-30])]),
    ],
    ids=["zeros", "constant", "tiny", "huge", "outlier", "speck", "tiny among others"],
)
def test_degenerate_tensors_stay_finite(name: str, method: str, bits: int, values: Tensor) -> None:
    quantizer = fit(name, values, bits, method)
    result = quantizer(values)
    assert torch.isfinite(result).all()
    parameters = [v for v in quantizer.describe().values() if isinstance(v, int | float)]
    assert all(math.isfinite(value) for value in parameters)
    if name == "sulq":  # its values are powers of two less eta, and zero need not be among them
        return
    if float(values.min()) == float(values.max()) and float(values.max()) >= 1:
        assert torch.allclose(result, values, rtol=1e-6)
    assert float(quantizer(torch.zeros(1))) == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_negative_constants_and_outliers(bits: int) -> None:
    for values in (torch.full((100,), -3.0), torch.cat([-torch.rand(99), torch.tensor([-1e30])])):
        assert torch.isfinite(fit("uniform", values, bits)(values)).all()
    constant = torch.full((100,), -3.0)
    assert torch.allclose(fit("uniform", constant, bits)(constant), constant)
    mixed = torch.cat([torch.rand(99), torch.tensor([-1e30])])
    assert torch.isfinite(fit("twin-uniform", mixed, bits)(mixed)).all()


@every_quantizer
def test_what_is_not_supported_is_refused(name: str) -> None:
    for low, high in [(-3.0, -1.0), (-1.0, 0.5), (-0.17, 0.5), (0.0, 0.5), (0.1, 0.5)]:
        values = torch.tensor([low, high])
        if takes(name, values):
            assert torch.isfinite(fit(name, values, 4)(values)).all()
        else:
            with pytest.raises(ValueError, match=f"{name} quantises values .*got {low:g} to"):
                fit(name, values, 4)


# ── the papers' formulas, written out ─────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "rate"), [("log2", 1), ("log-sqrt2", 2)])
@pytest.mark.parametrize("bits", [3, 4])
def test_powers_of_a_base(name: str, rate: int, bits: int) -> None:
    """RepQ-ViT, eq. 11 (rate 2): ``clip(round(-2 log2(x / s)), 0, 2**b - 1)``, last code zero."""
    values = values_of("softmax")
    quantizer = fit(name, values, bits, integer_values=False)
    scale = quantizer.describe()["scale"]
    codes = np.clip(np.rint(-rate * np.log2(values.double().numpy() / scale)), 0, 2**bits - 1)
    wanted = np.where(codes == 2**bits - 1, 0, scale * 2 ** (-codes / rate))
    np.testing.assert_allclose(quantizer(values).numpy(), wanted, rtol=1e-5)


@given(bits=st.integers(3, 8), seed=st.integers(0, 30))
@quick
def test_sulq_has_honest_levels(bits: int, seed: int) -> None:
    """I&S-ViT, eqs. 9 and 10, at ``2**bits`` codes with an integer zero point."""
    values = values_of("softmax", seed)
    quantizer: Any = fit("sulq", values, bits, integer_values=False)
    about = quantizer.describe()
    eta, scale, zero_point = about["eta"], about["scale"], about["zero_point"]
    assert zero_point == round(zero_point)
    exact = -np.log2(values.double().numpy() + eta) / scale + zero_point
    codes = np.clip(np.rint(exact), 0, 2**bits - 1)
    exponent = -scale * (codes - zero_point)
    clear = (np.abs(exact % 1 - 0.5) > 1e-3) & (np.abs(exponent % 1 - 0.5) > 1e-3)
    wanted = 2 ** np.rint(exponent) - eta
    mine = quantizer.codes(values).numpy()
    np.testing.assert_array_equal(mine[clear], codes[clear])
    assert mine.min() >= 0 and mine.max() <= 2**bits - 1
    # Settling may give a value that another code reads to that code.
    assert np.mean(np.isclose(quantizer(values).numpy()[clear], wanted[clear], atol=1e-6)) > 0.95


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("q", [1, 10, 37, 100, 138])
def test_adalogs_lookup_tables(bits: int, q: int) -> None:
    """AdaLog, eq. 9: ``2**-T1[k] * T2[k]``, close to ``2**(-k q / 37)``."""
    found = adalog_fractions(torch.tensor([q]), bits)[0].double().numpy()
    multiple = 2 ** (bits + 1) - 2
    for k in range(2**bits):
        t1 = math.floor(k * q / 37)
        t2 = round(2 ** (-((k * q) % 37) / 37) * multiple) / multiple
        if t1 < 126:
            assert found[k] == pytest.approx(2.0**-t1 * t2, rel=1e-6)
            assert found[k] == pytest.approx(2 ** (-k * q / 37), rel=1 / multiple)


def error(quantizer: FittedQuantizer, values: Tensor) -> float:
    return float((quantizer(values) - values).square().mean())


def peaky(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(600, 197, generator=generator) * 3, 1).flatten()


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("bits", [6, 8])
def test_adalogs_fine_bases_pay_at_6_and_8_bits(bits: int, integer: bool) -> None:
    values = peaky()
    fine: Any = fit("adalog", values, bits, integer_values=integer)
    coarse: Any = fit("adalog", values, bits, integer_values=integer, lowest_q=10)
    assert fine.describe()["q"] < 10 <= coarse.describe()["q"]
    assert error(fine, values) < 0.5 * error(coarse, values)


def test_adalog_shifts_gelu_outputs_and_no_others() -> None:
    assert fit("adalog", values_of("softmax"), 4).describe()["shift"] == 0
    gelu = values_of("gelu")
    quantizer = fit("adalog", gelu, 4)
    assert quantizer.describe()["shift"] == pytest.approx(0.16997124)
    assert float(quantizer(torch.tensor([-0.16997124]))) == pytest.approx(-0.16997124, abs=0.01)


def test_adalogs_shift_may_leave_by_the_next_layers_bias() -> None:
    """``W^ (v - c) + b = W^ v + (b - c W^ 1)``: the paper's bias reparameterisation."""
    generator = torch.Generator().manual_seed(0)
    gelu = values_of("gelu", size=4096).reshape(-1, 64)
    weight, bias = torch.randn(10, 64, generator=generator), torch.randn(10, generator=generator)
    quantizer = fit("adalog", gelu, 4)
    shift = quantizer.describe()["shift"]
    mine = nn.functional.linear(quantizer(gelu), weight, bias)
    papers = nn.functional.linear(quantizer(gelu) + shift, weight, bias - shift * weight.sum(1))
    torch.testing.assert_close(mine, papers, rtol=1e-5, atol=1e-4)


def test_twin_uniforms_steps() -> None:
    softmax: Any = fit("twin-uniform", values_of("softmax"), 4, "minmax", integer_values=False)
    top = max(softmax.values)
    assert top == pytest.approx(float(values_of("softmax").max()), rel=1e-6)
    assert softmax.split / top == pytest.approx(2 ** round(math.log2(softmax.split / top)))
    assert softmax.low_step == pytest.approx(softmax.split / 8)
    assert softmax.high_step == pytest.approx((top - softmax.split) / 7)
    gelu: Any = fit("twin-uniform", values_of("gelu"), 4, integer_values=False)
    ratio = math.log2(gelu.low_step / gelu.high_step)
    assert gelu.split == 0 and ratio == round(ratio) and ratio < 0


@pytest.mark.parametrize("name", ["log2", "log-sqrt2", "adalog", "twin-uniform"])
@pytest.mark.parametrize("bits", [3, 4])
def test_rounding_the_values_to_8_bits_costs_little_at_few_bits(name: str, bits: int) -> None:
    values = peaky()
    added = error(fit(name, values, bits), values) / error(
        fit(name, values, bits, integer_values=False), values
    )
    assert added < 1.02, f"{name} at {bits} bits: error times {added:.4f}"


def test_log_sqrt2_keeps_the_small_softmax_outputs_that_uniform_loses() -> None:
    values = values_of("softmax", 0, 40_000)
    log, uniform = (
        (fit(n, values, 4)(values) > 0).float().mean() for n in ("log-sqrt2", "uniform")
    )
    assert log > 1.5 * uniform


# ── the arithmetic, against ONNX's words ──────────────────────────────────────────────────────


def onnx_codes(x: np.ndarray, scale: np.float32, zero_point: int, bits: int) -> np.ndarray:
    """QuantizeLinear: ``saturate(round_half_even(x / scale) + zero_point)``, in float32."""
    divided = (x / scale).astype(np.float32)
    return np.clip(np.rint(divided) + np.float32(zero_point), 0, 2**bits - 1)


@given(
    values=st.lists(FINITE, min_size=1, max_size=30),
    scale=SCALES,
    bits=BITS,
    zero_fraction=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_rounding_is_onnx_quantize_linear(
    values: list[float], scale: float, bits: int, zero_fraction: float
) -> None:
    zero_point = round(zero_fraction * (2**bits - 1))
    # beside any values: exact ties of every code, and the floats next to them
    ties = (np.arange(-3, 2**bits + 3, dtype=np.float32) - zero_point + np.float32(0.5)) * (
        np.float32(scale)
    )
    x = np.concatenate(
        [
            np.array(values, np.float32),
            ties,
            np.nextafter(ties, np.inf),
            np.nextafter(ties, -np.inf),
        ]
    ).astype(np.float32)
    wanted = onnx_codes(x, np.float32(scale), zero_point, bits)
    codes = quantize_codes(torch.from_numpy(x), scale, zero_point, bits)
    np.testing.assert_array_equal(codes.numpy(), wanted)
    result = fake_quantize(torch.from_numpy(x), scale, zero_point, bits)
    np.testing.assert_array_equal(
        result.numpy(), (wanted - np.float32(zero_point)) * np.float32(scale)
    )


def test_ties_go_to_even_before_the_zero_point_is_added() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    codes = quantize_codes(x, 1.0, 3, 8)
    assert codes.tolist() == [1, 3, 3, 5, 5]  # round(x + 3) would give 2, 2, 4, 4, 6


def test_the_operators_pass_torchs_own_checks() -> None:
    x = torch.rand(2, 3)
    torch.library.opcheck(fake_quantize, (x, 0.1, 3, 4))
    torch.library.opcheck(dequantize, (torch.ones(2, 3, dtype=torch.int8), x[0], 1, 8))
    torch.library.opcheck(fake_quantize_log, (x, 0.0, 2.0, 0.0, [1.0, 0.7, 0.5, 0.0], 0.0, 0))
    twin = (x, 0.25, 0.125, 0.75, [0.0, 0.125, 0.25, 1.0], 0.125, 0)
    torch.library.opcheck(fake_quantize_twin, twin)


def test_the_input_is_not_changed_in_place() -> None:
    x = torch.rand(100) + 0.1
    before = x.clone()
    fake_quantize(x, 0.1, 0, 4)
    fake_quantize_log(x, 0.0, 2.0, 0.0, [1.0, 0.7, 0.5, 0.0], 0.0, 0)
    fake_quantize_twin(x, 0.25, 0.125, 0.75, [0.0, 0.125, 0.25, 1.0], 0.125, 0)
    assert torch.equal(x, before)


def test_logarithms_of_nothing_have_the_last_code() -> None:
    x = torch.tensor([0.0, -0.0, -1.0, float("-inf"), 1e-45, 1.0, float("inf")])
    codes = log_codes(x, 0.0, 37.0, 0.0, 255)
    assert codes.tolist() == [255, 255, 255, 255, 255, 0, 0]
    assert log_codes(x - 0.5, 0.5, 1.0, 0.0, 7).tolist() == [7, 7, 7, 7, 7, 0, 0]


# ── the registry ──────────────────────────────────────────────────────────────────────────────


def test_names_are_unique_and_known() -> None:
    assert {"uniform", "log-sqrt2"} <= set(list_quantizers())
    assert list_quantizers() == sorted(set(list_quantizers()))
    assert all(get_quantizer(name).name == name for name in list_quantizers())
    with pytest.raises(ValueError, match="registered already"):
        register_quantizer("uniform")(type("Another", (), {}))
    with pytest.raises(KeyError):
        get_quantizer("nothing")
