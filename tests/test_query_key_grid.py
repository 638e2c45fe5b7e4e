"""Queries and keys rewritten for one grid each: exact in float, better in codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deploykit.graph.signal import sqnr_db
from deploykit.quant.attention_grid import operand_rows, rewrite_operand
from deploykit.quant.calibrate import observe
from deploykit.quant.folds.attention import find_attention
from deploykit.quant.folds.head_scale import fold_query_key
from deploykit.quant.folds.scalars import absorb_scalars
from deploykit.quant.prepare import planned
from deploykit.quant.quantize import QuantizeOptions, quantize
from deploykit.quant.query_key_grid import fold_query_keys
from tests.graphs import aten, captured, images, nodes_of
from tests.test_folds_attention import EXACT, FAMILIES, clean, error, family, random_positive


@pytest.mark.parametrize("name", FAMILIES)
def test_a_number_before_the_product_goes_into_the_weights(name: str) -> None:
    graph_module, x = family(name)
    expected, products = graph_module(x), len(nodes_of(graph_module, aten.mul.Tensor))
    names = {group.logits.name for group in find_attention(graph_module)}
    assert absorb_scalars(graph_module, set()) == 0
    count = absorb_scalars(graph_module, names)
    clean(graph_module)
    assert error(graph_module(x), expected) < EXACT
    assert len(nodes_of(graph_module, aten.mul.Tensor)) == products - count
    groups = find_attention(graph_module)
    if name in ("vit with registers and layer scale", "swin"):
        assert count == len(groups)
        assert all(group.query.shift_declined is None for group in groups)
    assert absorb_scalars(graph_module, names) == 0


class Attention(nn.Module):
    """One attention over 8x8 tokens, its logits passed through ``between``."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)
        self.between, self.head = between, nn.Linear(16, 10)
        with torch.no_grad():
            self.qkv.bias[16:32] = 4 * torch.randn(16)  # keys far from zero, each its own way
            self.qkv.weight[:16] *= torch.rand(16, 1).mul(4).exp()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT
        parts = self.qkv(tokens).unflatten(2, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        weights = self.between(0.5 * q @ k.mT)
        return self.head((weights @ v).transpose(1, 2).flatten(2).mean(1))


class Softmax(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class Masked(nn.Module):
    """A bias for every pair, a temperature for every head, windows taken apart and put back."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.heat = nn.Parameter(torch.randn(64, 64)), nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, logits: Tensor) -> Tensor:
        spread = (logits * self.heat + self.bias).unflatten(1, (2, 2)) + 1.0
        return spread.flatten(1, 2).softmax(-1)


class OverQueries(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.softmax(-2)


class PerKey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(64))

    def forward(self, logits: Tensor) -> Tensor:
        return (logits * self.scale).softmax(-1)


class Squared(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.square().softmax(-1)


@pytest.mark.parametrize("between", [Softmax(), Masked()])
def test_the_softmax_does_not_see_what_is_added_to_all_keys(between: nn.Module) -> None:
    graph_module = captured(Attention(between).eval()).graph_module
    x = images(2)
    expected = graph_module(x)
    (group,) = find_attention(graph_module)
    assert group.key.shift_declined is None
    shape = tuple(group.key.channels.shape)
    fold_query_key(graph_module, group, random_positive(*shape), 3 * torch.randn(shape))
    assert error(graph_module(x), expected) < EXACT


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (OverQueries(), "not taken over the keys"),
        (PerKey(), "keys are scaled differently"),
        (Squared(), "stands between"),
    ],
)
def test_a_shift_that_would_be_seen_is_declined(between: nn.Module, reason: str) -> None:
    model = captured(Attention(between).eval())
    (group,) = find_attention(model.graph_module)
    assert group.key.shift_declined is not None and reason in group.key.shift_declined
    shape = tuple(group.key.channels.shape)
    with pytest.raises(ValueError, match=reason):
        fold_query_key(model.graph_module, group, torch.ones(shape), torch.ones(shape))
    x = images(4)
    options = QuantizeOptions(16, 16, keep_8bit=(), edge_bits=16)
    made = quantize(model, options, lambda: [x])
    assert sqnr_db(model.graph_module(x), made.graph_module(x)) > 50


def test_keys_far_from_zero_lose_less_at_four_bits() -> None:
    model, x = captured(Attention(Softmax()).eval()), images(16)
    found = {}
    for head_fold in (False, True):
        options = QuantizeOptions(8, 4, head_fold=head_fold, softmax="uniform")
        made = quantize(model, options, lambda: [x])
        found[head_fold] = sqnr_db(model.graph_module(x), made.graph_module(x))
        assert any(r.name == "fold_query_keys" for r in made.records) == head_fold
    assert found[True] > found[False] + 3


@pytest.mark.parametrize("bits", [4, 8])
def test_the_rewrite_is_exact_and_what_measured_best(bits: int) -> None:
    model, x = captured(Attention(Softmax()).eval()), images(4)
    graph_module, options = model.graph_module, QuantizeOptions(bits, bits, keep_8bit=())
    expected = graph_module(x)
    absorb_scalars(graph_module, {find_attention(graph_module)[0].logits.name})
    plans = planned(graph_module, options)
    observed = observe(graph_module, plans, options, lambda: [x])
    histograms, grids = dict(observed.histograms), {}
    record = fold_query_keys(graph_module, plans, histograms, observed.samples, "percentile", grids)
    assert error(graph_module(x), expected) < EXACT
    (errors,) = record.details["relative_error"].values()
    (name,) = [name for name in errors if f"({name} 1)" in record.summary]
    assert errors[name] < 0.5 * errors["off"]
    (group,) = find_attention(graph_module)
    assert set(grids) == {(part.node.name, bits) for part in (group.query, group.key)}
    again = observe(graph_module, plans, options, lambda: [x])
    for part in (group.query, group.key):
        told, seen = (operand_rows(h, part) for h in (histograms, dict(again.histograms)))
        torch.testing.assert_close(told.low, seen.low, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(told.high, seen.high, rtol=1e-4, atol=1e-4)


def test_histograms_of_the_layer_behind_follow() -> None:
    model, x = captured(Attention(Softmax()).eval()), images(4)
    graph_module, options = model.graph_module, QuantizeOptions(8, 8)
    observed = observe(graph_module, planned(graph_module, options), options, lambda: [x])
    (group,) = find_attention(graph_module)
    histograms, shape = dict(observed.histograms), tuple(group.key.channels.shape)
    before = operand_rows(histograms, group.value)
    ratio, shift = random_positive(*shape), torch.randn(shape)
    rewrite_operand(histograms, group.key, ratio, shift)
    after = operand_rows(histograms, group.key)
    first = operand_rows(dict(observed.histograms), group.key)
    expected = (first.low + shift.flatten()) / ratio.flatten()
    torch.testing.assert_close(after.low, expected.float())
    assert torch.equal(operand_rows(histograms, group.value).low, before.low)
