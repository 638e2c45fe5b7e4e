"""Laws every activation quantiser keeps, whichever are registered."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from deploykit.graph.ops import fake_quantize, fake_quantize_log_sqrt2, quantize_codes
from deploykit.quant.observers import TENSOR_BINS, Histogram
from deploykit.quant.quantizers import get_quantizer, list_quantizers, register_quantizer
from deploykit.quant.quantizers.registry import FittedQuantizer
from deploykit.quant.quantizers.uniform import UniformQuantizer

METHODS = ("minmax", "percentile", "percentile-mse")
BITS = st.integers(2, 8)
FINITE = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
SCALES = st.floats(2.0**-27, 2.0**27, width=32)
every_quantizer = pytest.mark.parametrize("name", list_quantizers())
quick = settings(max_examples=40, deadline=None)


def histogram_of(values: Tensor) -> Histogram:
    values = values.flatten()
    low, high = values.min(), values.max()
    index = ((values - low) * (TENSOR_BINS / (high - low if high > low else 1.0))).long()
    counts = torch.bincount(index.clamp(0, TENSOR_BINS - 1), minlength=TENSOR_BINS)
    return Histogram(low[None], high[None], counts.float()[None])


def only_positive(name: str) -> bool:
    try:
        get_quantizer(name).fit(histogram_of(torch.tensor([-1.0, 1.0])), 4, "minmax")
    except ValueError:
        return True
    return False


def sample(name: str, seed: int, size: int = 4000) -> Tensor:
    """Values of the kind a quantiser is for: softmax outputs, or skewed and of both signs."""
    generator = torch.Generator().manual_seed(seed)
    if only_positive(name):
        return torch.softmax(torch.randn(size // 40, 40, generator=generator) * 3, 1).flatten()
    return torch.randn(size, generator=generator).exp() - 0.7


def fit(name: str, values: Tensor, bits: int, method: str = "percentile") -> FittedQuantizer:
    return get_quantizer(name).fit(histogram_of(values), bits, method)


@every_quantizer
@given(bits=BITS, seed=st.integers(0, 99), method=st.sampled_from(METHODS))
@quick
def test_idempotent_monotone_and_of_few_values(
    name: str, bits: int, seed: int, method: str
) -> None:
    values = sample(name, seed)
    quantizer = fit(name, values, bits, method)
    once = quantizer(values)
    assert once.dtype == torch.float32 and once.shape == values.shape
    assert torch.equal(quantizer(once), once)
    assert len(once.unique()) <= 2**bits
    ordered = quantizer(values.sort().values)
    assert (ordered.diff() >= 0).all()


@every_quantizer
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_dense_sweep_meets_every_code_and_no_other(name: str, bits: int) -> None:
    quantizer = fit(name, sample(name, 0), bits)
    top = 4 * float(sample(name, 0).abs().max())
    sweep = torch.cat([torch.linspace(0, top, 200_001), torch.logspace(-45, 1, 20_001)])
    if not only_positive(name):
        sweep = torch.cat([sweep, -sweep])
    assert len(quantizer(sweep).unique()) == 2**bits


@every_quantizer
@given(bits=BITS, seed=st.integers(0, 20), method=st.sampled_from(METHODS))
@quick
def test_zero_is_kept_and_large_values_saturate(
    name: str, bits: int, seed: int, method: str
) -> None:
    values = sample(name, seed)
    quantizer = fit(name, values, bits, method)
    assert float(quantizer(torch.zeros(1))) == 0
    extremes = torch.tensor([float(values.max()) * 10, 1e9, 1e30])
    assert len(quantizer(extremes).unique()) == 1
    assert float(quantizer(extremes)[0]) <= float(values.max()) * (1 + 1 / 2**bits) + 1e-6


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
    if float(values.min()) == float(values.max()) and float(values.max()) >= 1:
        assert torch.allclose(result, values, rtol=1e-6)
    assert float(quantizer(torch.zeros(1))) == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_negative_constants_and_outliers(bits: int) -> None:
    for values in (torch.full((100,), -3.0), torch.cat([-torch.rand(99), torch.tensor([-1e30])])):
        assert torch.isfinite(fit("uniform", values, bits)(values)).all()
    constant = torch.full((100,), -3.0)
    assert torch.allclose(fit("uniform", constant, bits)(constant), constant)


@every_quantizer
def test_it_calls_the_operator_it_inserts(name: str) -> None:
    values = sample(name, 3)
    quantizer = fit(name, values, 4)
    graph = fx.Graph()
    graph.output(quantizer.insert(graph, graph.placeholder("x")))
    assert torch.equal(fx.GraphModule(torch.nn.Module(), graph)(values), quantizer(values))
    assert quantizer.describe()["kind"] == name


def test_log_sqrt2_refuses_negative_values() -> None:
    with pytest.raises(ValueError, match="values >= 0"):
        fit("log-sqrt2", torch.tensor([-0.1, 0.5]), 4)


@given(bits=BITS, seed=st.integers(0, 50))
@quick
def test_uniform_error_is_half_a_step_inside_the_range(bits: int, seed: int) -> None:
    values = sample("uniform", seed)
    quantizer = fit("uniform", values, bits)
    assert isinstance(quantizer, UniformQuantizer)
    assert 0 <= quantizer.zero_point < 2**bits
    scale = quantizer.scale
    low, high = -quantizer.zero_point * scale, (2**bits - 1 - quantizer.zero_point) * scale
    inside = values[(values >= low) & (values <= high)]
    assert ((quantizer(inside) - inside).abs() <= scale * 0.50001).all()
    assert (quantizer(values[values > high]) == quantizer(torch.tensor([high]))).all()


@given(bits=st.integers(2, 8), seed=st.integers(0, 50))
@quick
def test_log_sqrt2_error_is_a_quarter_octave_above_its_smallest_value(bits: int, seed: int) -> None:
    values = sample("log-sqrt2", seed)
    quantizer = fit("log-sqrt2", values, bits)
    scale = quantizer.describe()["scale"]
    inside = values[(values <= scale) & (values >= scale * 2 ** (-(2**bits - 2) / 2))]
    ratio = (quantizer(inside) / inside).log2()
    assert (ratio.abs() <= 0.2501).all()


def test_log_sqrt2_keeps_the_small_softmax_outputs_that_uniform_loses() -> None:
    values = sample("log-sqrt2", 0, 40_000)
    log, uniform = (
        (fit(n, values, 4)(values) > 0).float().mean() for n in ("log-sqrt2", "uniform")
    )
    assert log > 2 * uniform


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
    torch.library.opcheck(fake_quantize_log_sqrt2, (x, 0.5, 4))


def test_the_input_is_not_changed_in_place() -> None:
    x = torch.rand(100) + 0.1
    before = x.clone()
    fake_quantize(x, 0.1, 0, 4)
    fake_quantize_log_sqrt2(x, 0.5, 4)
    assert torch.equal(x, before)


# ── the registry ──────────────────────────────────────────────────────────────────────────────


def test_names_are_unique_and_known() -> None:
    assert {"uniform", "log-sqrt2"} <= set(list_quantizers())
    assert list_quantizers() == sorted(set(list_quantizers()))
    assert all(get_quantizer(name).name == name for name in list_quantizers())
    with pytest.raises(ValueError, match="registered already"):
        register_quantizer("uniform")(type("Another", (), {}))
    with pytest.raises(KeyError):
        get_quantizer("nothing")
