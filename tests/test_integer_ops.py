"""I-ViT's integer operators: their formulas, and the truth about their errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploykit.errors import DeploykitError
from deploykit.graph.signal import sqnr_db
from deploykit.quant.integer_ops import int_gelu, int_layer_norm, int_softmax, shift_exp
from deploykit.quant.research_integer import replace_with_integer_ops
from tests.graphs import SIZE, aten, batches, captured, images, nodes_of, tiny_shvit, tiny_vit

research = torch.ops.deploykit


def normal(*shape: int, spread: float = 1.0) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def symmetric(x: Tensor, bits: int = 8) -> tuple[Tensor, float]:
    top = 2 ** (bits - 1) - 1
    scale = float(x.abs().max()) / top
    return torch.round(x / scale).long(), scale


def exact_shift_exp(code: int, scale: float, shift: int) -> int:
    """The paper's formula in Python's integers, and rational numbers where it divides."""
    code += code // 2 - code // 16
    one = -math.floor(-1 / scale)  # -I0
    code = max(code, -shift * one)
    whole, rest = divmod(-code, one)  # code = -whole * one - rest
    return (2 * one - rest) * 2 ** (shift - whole) // 2


@settings(max_examples=200, deadline=None)
@given(
    code=st.integers(-(2**15), 0),
    scale=st.floats(1e-4, 0.9),
    shift=st.sampled_from([4, 15, 23]),
)
def test_shift_exp_is_the_paper_s_formula(code: int, scale: float, shift: int) -> None:
    got = shift_exp(torch.tensor([code]), scale, shift)
    assert got.dtype == torch.int64
    assert int(got) == exact_shift_exp(code, scale, shift)


def relative_errors(scale: float) -> Tensor:
    """Of ShiftExp with 15 bits, down to where its range ends."""
    codes = -torch.arange(0, int(15 / scale / 1.4375) + 1)
    got = shift_exp(codes, scale, 15).double() * scale / 2**15
    return got / torch.exp(codes * scale).double() - 1


def test_shift_exp_is_up_to_14_8_percent_too_large() -> None:
    errors = relative_errors(1 / 13)
    assert errors.max() == pytest.approx(0.148, abs=0.001)
    assert errors.min() > -0.02


def test_a_fine_scale_leaves_the_errors_of_the_straight_line_and_of_1_4375() -> None:
    # 2**u against 1 + u/2 is worst at u = 1/ln 2 - 2; 1.4375 ln 2 = 0.9964 lets the rest grow
    u = 1 / math.log(2) - 2
    line = (1 + u / 2) / 2**u
    slope = math.exp((1 - 1.4375 * math.log(2)) * 15 / 1.4375)
    assert relative_errors(1 / 4096).max() == pytest.approx(line * slope - 1, abs=0.003)


def test_a_scale_that_does_not_divide_one_spoils_the_exponent() -> None:
    assert relative_errors(1 / 12.7).max() > 0.4


def test_8_bit_softmax_rows_sum_to_far_less_than_1_and_16_bit_ones_nearly_to_1() -> None:
    codes, scale = symmetric(normal(512, 197, spread=2.0))
    sums = {}
    for bits in (8, 16):
        out, out_scale = int_softmax(codes, scale, bits)
        assert out.dtype == torch.int64 and out_scale == 2.0 ** -(bits - 1)
        assert out.min() >= 0 and out.max() < 2 ** (bits - 1)
        sums[bits] = out.double().sum(-1) * out_scale
        assert sums[bits].max() <= 1
        if bits == 8:
            assert (out == 0).double().mean() > 0.8
    assert sums[8].mean() < 0.75
    assert sums[16].min() > 0.99


def test_softmax_against_float() -> None:
    scale = 1 / 13
    codes = torch.round(normal(64, 197, spread=2.0) / scale).long().clamp(-128, 127)
    out, out_scale = int_softmax(codes, scale, 16)
    reference = torch.softmax(codes * scale, -1)
    # ShiftExp's relative error, in numerator and sum, and one step of the result
    assert bool(((out * out_scale - reference).abs() <= 0.15 * reference + 2 * out_scale).all())
    moved, _ = int_softmax(codes.T, scale, 16, dim=0)
    assert torch.equal(moved.T, out)


def test_softmax_at_a_scale_that_would_pass_32_bits() -> None:
    codes = torch.tensor([[0, -1000, -2000, -(2**14)]])
    scale = 1e-4  # with the paper's 15 bits, the sum of four would be 1.3e9 times 4
    out, out_scale = int_softmax(codes, scale, 16)
    assert torch.allclose((out * out_scale).float(), torch.softmax(codes * scale, -1), atol=0.05)
    with pytest.raises(ValueError, match="too small"):
        int_softmax(torch.zeros(1, 4).long(), 1e-9)


def test_equal_logits_share_equally_and_floats_are_refused() -> None:
    out, out_scale = int_softmax(torch.full((2, 16), 5), 0.1, 16)
    assert torch.allclose((out * out_scale).float(), torch.full((2, 16), 1 / 16), rtol=1e-2)
    for wrong in (torch.zeros(2), torch.zeros(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="integer codes"):
            int_softmax(wrong, 0.1)
    with pytest.raises(ValueError, match="bits"):
        int_softmax(torch.zeros(2).long(), 0.1, bits=17)
    with pytest.raises(ValueError, match="positive"):
        int_gelu(torch.zeros(2).long(), 0.0)


@pytest.mark.parametrize("top", [1.0, 2.0, 4.0])
def test_gelu_against_float(top: float) -> None:
    codes, scale = torch.arange(-127, 128), top / 127
    out, out_scale = int_gelu(codes, scale)
    error = (out * out_scale - F.gelu(codes * scale)).abs()
    # the reciprocal of the sigmoid's sum has only a few bits: up to a sixth is lost, or a third
    # where the scale is so fine that the sum fills 30 of 31 bits
    assert error.max() < (0.35 if top == 1.0 else 0.2) * top
    assert error[codes <= 0].max() < 0.04
    assert out[codes == 0] == 0


def test_gelu_breaks_where_a_row_reaches_far() -> None:
    """exp(-m) ends at 2^-23, and so does exp(x - m): sigmoid(-20) becomes a half."""
    out, out_scale = int_gelu(torch.arange(-127, 128), 12 / 127)
    assert float(out[0] * out_scale) < -5  # GELU(-12) is 0


def test_gelu_of_a_row_of_negative_values_stays_in_32_bits() -> None:
    codes = torch.tensor([[-127, -100, -64, -32]])
    out, out_scale = int_gelu(codes, 6 / 127)
    assert torch.allclose((out * out_scale).float(), F.gelu(codes * 6 / 127), atol=0.05)


def test_layer_norm_against_float() -> None:
    x = normal(64, 384) * torch.linspace(0.2, 5, 384)
    weight, bias = normal(384) + 1, normal(384)
    for bits, limit in ((16, 1e-3), (8, 0.1)):
        codes, _ = symmetric(x, bits)
        out, scale = int_layer_norm(codes, weight, bias)
        reference = F.layer_norm(codes.double(), (384,), weight.double(), bias.double())
        assert out.abs().max() < 2**31
        assert (out * scale - reference).abs().max() < limit * weight.abs().max()


def test_layer_norm_of_a_zero_or_tiny_weight_is_its_bias() -> None:
    codes, _ = symmetric(normal(8, 16), 16)
    weight, bias = torch.ones(16), torch.linspace(-2, 2, 16)
    weight[3], weight[4], weight[5] = 0.0, 1e-20, -1.0
    bias[6], weight[7], bias[7] = 1e6, 0.0, 0.0
    out, scale = int_layer_norm(codes, weight, bias)
    got = out * scale
    assert bool(torch.isfinite(got).all())
    assert torch.allclose(got[:, 3], bias[3].double().expand(8), rtol=1e-6)
    assert torch.allclose(got[:, 4], bias[4].double().expand(8), rtol=1e-6)
    assert torch.equal(got[:, 7], torch.zeros(8, dtype=torch.float64))
    reference = F.layer_norm(codes.double(), (16,), weight.double(), bias.double())
    assert torch.allclose(got, reference, rtol=1e-5, atol=1e-3)


def test_layer_norm_of_narrow_codes_comes_out_too_small() -> None:
    """Ten halvings of 2^16 reach 64, so a root of 4 isn't reached."""
    codes = torch.tensor([[2, -2, 2, -2]])
    out, scale = int_layer_norm(codes, torch.ones(4), torch.zeros(4))
    assert (out * scale).abs().max() < 0.1  # LayerNorm gives 1
    constant, scale = int_layer_norm(torch.full((1, 4), 7), torch.ones(4), torch.ones(4))
    assert torch.allclose(constant * scale, torch.ones(1, 4).double())
    with pytest.raises(ValueError, match=r"\(4,\)"):
        int_layer_norm(codes, torch.ones(3), torch.zeros(3))


def test_the_pass_replaces_every_operator_and_the_graph_stays_close() -> None:
    model = captured(tiny_vit())
    wide, narrow = model.copy().graph_module, model.copy().graph_module
    record = replace_with_integer_ops(wide, batches(), bits=16)
    replace_with_integer_ops(narrow, batches(), bits=8)
    assert record.details == {"softmax": 2, "gelu": 2, "layer_norm": 5, "float": 0}
    assert not nodes_of(wide, aten.softmax.int, aten.gelu.default, aten.layer_norm.default)
    assert len(nodes_of(wide, research.research_int_softmax.default)) == 2
    x = images()
    reference = model.graph_module(x)
    assert sqnr_db(reference, wide(x)) > 10
    assert not torch.equal(wide(x), narrow(x))


class Norms(nn.Module):
    """LayerNorm without weight and bias, one over two axes, and GELU by tanh."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (SIZE,))
        x = F.layer_norm(x, (SIZE, SIZE))
        return F.gelu(x, approximate="tanh").mean((2, 3)).repeat(1, 4)[:, :10]


def test_the_pass_leaves_what_the_paper_does_not_have() -> None:
    graph_module = captured(Norms()).graph_module
    before = graph_module(images())
    record = replace_with_integer_ops(graph_module, batches())
    assert record.details == {"softmax": 0, "gelu": 0, "layer_norm": 1, "float": 2}
    assert torch.allclose(graph_module(images()), before, atol=1e-3)
    shvit = captured(tiny_shvit()).graph_module  # GroupNorm stays
    assert replace_with_integer_ops(shvit, batches()).details["layer_norm"] == 0


class Masked(nn.Module):
    """Softmax with a mask of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([-math.inf] + [0.0] * (SIZE - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.mask).softmax(-1).mean((2, 3)).repeat(1, 4)[:, :10]


def test_the_pass_refuses_what_it_cannot_do() -> None:
    with pytest.raises(DeploykitError, match="isn't finite"):
        replace_with_integer_ops(captured(Masked()).graph_module, batches())
    model = captured(tiny_vit())
    with pytest.raises(DeploykitError, match="2 to 16"):
        replace_with_integer_ops(model.graph_module, batches(), bits=32)
    with pytest.raises(DeploykitError, match="no calibration images"):
        replace_with_integer_ops(model.graph_module, list)
