"""The quantiser with the least measured error is taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deploykit.errors import UsageError
from deploykit.quant.choose import choose_quantizer, histogram_error
from deploykit.quant.quantizers import get_quantizer, list_quantizers
from tests.histograms import METHODS, fit, histogram_of

ALL = ["uniform", *(name for name in list_quantizers() if name != "uniform")]
SPREADS = [0.5, 1.0, 3.0]


def softmax(spread: float, seed: int = 0, tokens: int = 197) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(200_000 // tokens, tokens, generator=generator) * spread, 1)


def gelu(spread: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.gelu(torch.randn(200_000, generator=generator) * spread)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spread", SPREADS)
def test_uniform_wins_at_8_bits(spread: float, method: str) -> None:
    for values in (softmax(spread), softmax(spread, tokens=64), gelu(spread)):
        assert choose_quantizer(histogram_of(values), 8, ALL, method)[0] == "uniform"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [3, 4])
def test_another_wins_on_attention_at_few_bits(bits: int, method: str) -> None:
    values = softmax(1.0)
    name, quantizer, errors = choose_quantizer(histogram_of(values), bits, ALL, method)
    assert name in ("log2", "log-sqrt2", "adalog")
    assert set(errors) == set(ALL)
    assert errors[name] == min(errors.values()) < 0.6 * errors["uniform"]
    uniform = fit("uniform", values, bits, method)
    # and so it is in the product that attention is for
    other = torch.randn(197, 64, generator=torch.Generator().manual_seed(1))
    mine, theirs = ((q(values) @ other - values @ other).norm() for q in (quantizer, uniform))
    assert mine < 0.8 * theirs


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_histograms_error_is_the_values_error(name: str, bits: int) -> None:
    values = softmax(3.0)
    quantizer = fit(name, values, bits)
    for power in (1.0, 2.0, 4.0):
        exact = float((quantizer(values) - values).double().abs().pow(power).mean())
        found = histogram_error(quantizer, histogram_of(values), power)
        assert found == pytest.approx(exact, rel=0.1 if power > 1 else 0.3)


def test_the_power_decides() -> None:
    """A few far values: many small errors or a few large ones."""
    values = torch.cat([torch.rand(100_000) * 0.01, torch.rand(20)])
    histogram = histogram_of(values)
    names = ["uniform", "log-sqrt2"]
    low = choose_quantizer(histogram, 4, names, "minmax", power=1.0)[0]
    high = choose_quantizer(histogram, 4, names, "minmax", power=20.0)[0]
    assert (low, high) == ("log-sqrt2", "uniform")


def test_a_little_better_is_not_enough() -> None:
    histogram = histogram_of(softmax(1.0))
    name, _, errors = choose_quantizer(
        histogram, 8, ["uniform", "twin-uniform"], "percentile", min_gain_db=0.0
    )
    assert name == "twin-uniform" and 0.8 < errors[name] / errors["uniform"] < 1
    assert choose_quantizer(histogram, 8, ["uniform", "twin-uniform"], "percentile")[0] == "uniform"
    same = choose_quantizer(histogram, 8, ["twin-uniform", "uniform"], "percentile")[0]
    assert same == "twin-uniform"


def test_only_what_takes_the_tensor_is_fitted() -> None:
    histogram = histogram_of(torch.randn(1000))
    name, quantizer, errors = choose_quantizer(histogram, 4, ALL, "minmax")
    assert set(errors) == {"uniform", "twin-uniform"} and quantizer.describe()["kind"] == name
    assert set(choose_quantizer(histogram_of(gelu(1.0)), 4, ALL, "minmax")[2]) == {
        "uniform",
        "twin-uniform",
        "adalog",
    }
    assert not get_quantizer("log2").supports(-1.0, 1.0)


def test_huge_values_have_finite_errors() -> None:
    histogram = histogram_of(torch.cat([torch.rand(999), torch.tensor([1e30])]))
    errors = choose_quantizer(histogram, 4, ALL, "percentile")[2]
    assert all(0 <= error < float("inf") for error in errors.values())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["uniform", "log3"], "no quantizer 'log3': choose among adalog"),
        (["log2"], "no quantizer of log2 takes values of -1 to 1: add 'uniform'"),
        ([], "no quantizer of an empty list"),
    ],
)
def test_refusals(names: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_quantizer(histogram_of(torch.tensor([-1.0, 1.0])), 4, names, "minmax")
