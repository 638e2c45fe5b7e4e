"""Laws every activation quantiser keeps, whichever are registered."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from deploykit.quant.quantizers import list_quantizers
from deploykit.quant.quantizers.adalog import GELU_SHIFT
from deploykit.quant.quantizers.registry import FittedQuantizer
from tests.histograms import METHODS, fit, has_table, pairs, takes, values_of
from tests.test_onnx import SIDE, as_images, lowered

BITS = st.integers(2, 8)
every_quantizer = pytest.mark.parametrize("name", list_quantizers())
every_pair = pytest.mark.parametrize(("name", "kind"), pairs())
quick = settings(max_examples=25, deadline=None)
ties_excepted = 1e-3  # share of values whose code may differ where a logarithm is rounded


def keeps_zero(name: str, kind: str) -> bool:
    """As the quantisers' documentation promises."""
    return name != "sulq" and (name, kind) != ("adalog", "gelu")


def sweep(values: Tensor) -> Tensor:
    """The values' range and beyond, densely, and magnitudes down to the smallest."""
    top = 6 * float(values.abs().max())
    small = torch.logspace(-45, 1, 20_001)
    x = torch.cat([torch.linspace(0, top, 200_001), small])
    return x if float(values.min()) >= 0 else torch.cat([x, -x, small - GELU_SHIFT])


def reachable() -> list[tuple[str, str, int]]:
    """All widths, but float32 has no 2**-254 to give log2's later codes to."""
    return [(*pair, bits) for pair in pairs() for bits in range(2, 7 if pair[0] == "log2" else 9)]


def fitted(name: str, values: Tensor, bits: int, method: str, integer: bool) -> FittedQuantizer:
    fields = {} if integer or not has_table(name) else {"integer_values": False}
    return fit(name, values, bits, method, **fields)


def test_every_quantiser_is_walked() -> None:
    assert {"uniform", "log2", "log-sqrt2", "sulq", "adalog", "twin-uniform"} <= {
        name for name, _ in pairs()
    }
    assert [name for name in list_quantizers() if takes(name, values_of("signed"))] == [
        "twin-uniform",
        "uniform",
    ]


@every_pair
@given(bits=BITS, seed=st.integers(0, 99), method=st.sampled_from(METHODS), integer=st.booleans())
@quick
def test_idempotent_monotone_and_of_few_values(
    name: str, kind: str, bits: int, seed: int, method: str, integer: bool
) -> None:
    values = values_of(kind, seed)
    quantizer = fitted(name, values, bits, method, integer)
    once = quantizer(values)
    assert once.dtype == torch.float32 and once.shape == values.shape
    assert torch.equal(quantizer(once), once)
    assert len(once.unique()) <= 2**bits
    assert (quantizer(values.sort().values).diff() >= 0).all()


@pytest.mark.parametrize(("name", "kind", "bits"), reachable())
def test_a_dense_sweep_meets_every_code_and_no_other(name: str, kind: str, bits: int) -> None:
    values = values_of(kind)
    quantizer: Any = fit(name, values, bits)
    x = sweep(values)
    assert torch.equal(quantizer.codes(x).unique(), torch.arange(2.0**bits))
    assert len(quantizer(x).unique()) <= 2**bits


@pytest.mark.parametrize(
    ("name", "kind", "bits"), [p for p in reachable() if p[0] not in ("sulq", "adalog")]
)
def test_every_code_has_a_value_of_its_own(name: str, kind: str, bits: int) -> None:
    """But where values are rounded: SULQ's exponents, AdaLog's mantissas, and 8-bit grids."""
    values = values_of(kind)
    quantizer = fitted(name, values, bits, "percentile", integer=False)
    assert len(quantizer(sweep(values)).unique()) == 2**bits


@every_pair
@given(bits=BITS, seed=st.integers(0, 20), method=st.sampled_from(METHODS), integer=st.booleans())
@quick
def test_zero_is_kept_and_large_values_saturate(
    name: str, kind: str, bits: int, seed: int, method: str, integer: bool
) -> None:
    values = values_of(kind, seed)
    quantizer = fitted(name, values, bits, method, integer)
    tiny = torch.tensor([0.0, -0.0, 1e-45, 1e-38])
    assert torch.isfinite(quantizer(tiny)).all()
    if keeps_zero(name, kind):
        assert (quantizer(tiny[:2]) == 0).all()
    extremes = quantizer(torch.tensor([float(values.max()) * 10, 1e9, 1e30]))
    assert len(extremes.unique()) == 1
    if name != "sulq":  # whose largest value is a power of two less eta
        assert float(extremes[0]) <= float(values.max()) * (1 + 1 / 2**bits) + 1e-6


@every_pair
@given(bits=BITS, seed=st.integers(0, 50), method=st.sampled_from(METHODS))
@quick
def test_the_step_says_which_integers_the_values_are(
    name: str, kind: str, bits: int, seed: int, method: str
) -> None:
    values = values_of(kind, seed)
    quantizer: Any = fit(name, values, bits, method)
    assert isinstance(quantizer.zero_point, int) and 0 <= quantizer.zero_point <= 255
    step = quantizer.step if has_table(name) else quantizer.scale
    found = quantizer(values)
    codes = torch.round(found / step) + quantizer.zero_point
    assert codes.min() >= 0 and codes.max() <= 255
    assert torch.equal((codes - quantizer.zero_point) * torch.tensor(step), found)
    if has_table(name):
        assert fitted(name, values, bits, method, integer=False).step == 0


@every_pair
def test_it_calls_the_operator_it_inserts(name: str, kind: str) -> None:
    values = values_of(kind, 3)
    before = values.clone()
    quantizer = fit(name, values, 4)
    graph = fx.Graph()
    node = quantizer.insert(graph, graph.placeholder("x"))
    graph.output(node)
    assert torch.equal(fx.GraphModule(nn.Module(), graph)(values), quantizer(values))
    assert torch.equal(values, before)
    assert quantizer.describe()["kind"] == name
    assert quantizer.bits == 4
    torch.library.opcheck(node.target, (values[:6], *node.args[1:]))


# ── error bounds ──────────────────────────────────────────────────────────────────────────────


@given(bits=BITS, seed=st.integers(0, 50), kind=st.sampled_from(["softmax", "gelu", "signed"]))
@quick
def test_uniform_error_is_half_a_step_inside_the_range(bits: int, seed: int, kind: str) -> None:
    values = values_of(kind, seed)
    quantizer: Any = fit("uniform", values, bits)
    assert 0 <= quantizer.zero_point < 2**bits
    scale = quantizer.scale
    low, high = -quantizer.zero_point * scale, (2**bits - 1 - quantizer.zero_point) * scale
    inside = values[(values >= low) & (values <= high)]
    assert ((quantizer(inside) - inside).abs() <= scale * 0.50001).all()
    assert (quantizer(values[values > high]) == quantizer(torch.tensor([high]))).all()


@pytest.mark.parametrize(
    ("name", "kind"), [p for p in pairs() if p[0] in ("log2", "log-sqrt2", "adalog")]
)
@given(bits=BITS, seed=st.integers(0, 50), integer=st.booleans())
@quick
def test_logarithms_are_half_a_code_off_at_most(
    name: str, kind: str, bits: int, seed: int, integer: bool
) -> None:
    values = values_of(kind, seed)
    quantizer: Any = fitted(name, values, bits, "percentile", integer)
    scale, rate, shift = quantizer.describe()["scale"], quantizer.rate, quantizer.shift
    above = values + shift
    inside = (above <= scale) & (above >= scale * 2 ** (-(2**bits - 2) / rate))
    relative = 2 ** (0.5001 / rate) - 1
    if name == "adalog":  # T2's rounding, on both sides of settling
        relative += 2 / (2 ** (bits + 1) - 2)
    # Half a step from rounding onto the 8-bit grid. Where the codes are closer than its steps and
    # zero isn't one of the values, settling takes the nearest value that is read as itself.
    steps = 0.5001 if kind == "softmax" else 3
    allowed = above[inside] * relative + steps * quantizer.step + 1e-6
    assert ((quantizer(values[inside]) - values[inside]).abs() <= allowed).all()


@given(
    bits=BITS,
    seed=st.integers(0, 50),
    kind=st.sampled_from(["softmax", "gelu", "signed"]),
    integer=st.booleans(),
)
@quick
def test_twin_uniform_is_half_the_local_step_off_at_most(
    bits: int, seed: int, kind: str, integer: bool
) -> None:
    values = values_of(kind, seed)
    quantizer: Any = fitted("twin-uniform", values, bits, "percentile", integer)
    half = 2 ** (bits - 1)
    low = quantizer.split - half * quantizer.low_step
    high = quantizer.split + (half - 1) * quantizer.high_step
    inside = values[(values >= low) & (values <= high)]
    step = torch.where(inside < quantizer.split, quantizer.low_step, quantizer.high_step)
    allowed = step * 0.50001 + quantizer.step + 1e-6
    assert ((quantizer(inside) - inside).abs() <= allowed).all()


# ── simulation and file ───────────────────────────────────────────────────────────────────────


class Stacked(nn.Module):
    """Several quantisers of the same values, beside each other."""

    def __init__(self, quantizers: list[FittedQuantizer]) -> None:
        super().__init__()
        self.quantizers = quantizers

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([quantizer(x) for quantizer in self.quantizers], 1)


@cache
def both(kind: str, integer: bool) -> tuple[list[tuple[str, Any]], Any, Any]:
    """Every quantiser that takes these values at four widths, in torch and ONNX Runtime."""
    values = values_of(kind)
    made = [
        (name, fitted(name, values, bits, "percentile", integer))
        for name, of in pairs()
        if of == kind and (integer or has_table(name))
        for bits in (3, 4, 6, 8)
    ]
    graph, session, _ = lowered(Stacked([quantizer for _, quantizer in made]))
    return made, graph, session


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "gelu", "signed"])
@given(seed=st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_the_file_gives_the_simulations_values(kind: str, integer: bool, seed: int) -> None:
    made, graph, session = both(kind, integer)
    top = float(values_of(kind).abs().max())
    extra = torch.tensor([0.0, -0.0, 1e-45, 1e-38, 3 * top, 1e9, -1e-3, -3 * top])
    x = as_images(torch.cat([values_of(kind, seed, 20_000), extra]).numpy())
    assert x.shape[1:] == (3, SIDE, SIDE)
    wanted, found = graph(x), session(x)
    assert torch.isfinite(wanted).all() and torch.isfinite(found).all()
    for index, (name, quantizer) in enumerate(made):
        mine, theirs = wanted[:, index], found[:, index]
        differ = mine != theirs
        if name in ("uniform", "twin-uniform"):
            assert not differ.any(), name
            continue
        assert float(differ.float().mean()) <= ties_excepted, name
        table = torch.tensor(quantizer.values)
        codes = quantizer.codes(x[differ]).long()
        neighbours = torch.stack(
            [table[(codes + move).clamp(0, len(table) - 1)] for move in (-1, 1)]
        )
        assert (neighbours == theirs[differ]).any(0).all(), name
