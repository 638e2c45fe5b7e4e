"""Masks from scores, and the second-order update against its closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deploykit.errors import UsageError
from deploykit.prune.masks import (
    block_sums,
    keep_largest,
    keep_n_of_m,
    lamp_scores,
    spread_blocks,
)
from deploykit.prune.sparsity_methods import METHODS, LayerInputs, find_method, prune_matrix
from deploykit.prune.sparsity_obs import obs_n_of_m, obs_unstructured
from deploykit.prune.sparsity_patterns import Pattern, from_matrix, parse_pattern, to_matrix
from deploykit.prune.sparsity_shares import global_zeros, uniform_zeros
from deploykit.prune.sparsity_statistics import InputStatistics
from tests.graphs import captured, images, nodes_of

TWO_OF_FOUR = parse_pattern("2:4")
TINY = 1e-9  # no damping to speak of


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs that share a few causes, as activations do."""
    causes = random(rows, max(columns // 4, 1), seed=seed)
    mixing = random(max(columns // 4, 1), columns, seed=seed + 1)
    return causes @ mixing + 0.3 * random(rows, columns, seed=seed + 2)


def output_error(old: Tensor, new: Tensor, x: Tensor) -> float:
    return float((x @ (new - old).t()).square().mean())


@given(
    st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_each_group_keeps_exactly_n_and_the_largest(
    n_of_m: tuple[int, int], rows: int, groups: int, seed: int
) -> None:
    keep, group = n_of_m
    scores = random(rows, groups * group, seed=seed).round(decimals=1)  # with ties
    mask = keep_n_of_m(scores, keep, group).reshape(rows, groups, group)
    assert bool((mask.sum(-1) == keep).all())
    parts = scores.reshape(rows, groups, group)
    kept = parts.masked_fill(~mask, torch.inf).amin(-1)
    gone = parts.masked_fill(mask, -torch.inf).amax(-1)
    assert bool((kept >= gone).all())


def test_ties_keep_what_comes_first() -> None:
    assert keep_n_of_m(torch.ones(1, 8), 2, 4)[0].tolist() == [True, True, False, False] * 2
    assert keep_largest(torch.ones(2, 3), 2).tolist() == [[True] * 3, [True, False, False]]


@given(st.integers(0, 24), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_smallest_go_and_exactly_as_many_as_asked(zeros: int, seed: int) -> None:
    scores = random(4, 6, seed=seed).round(decimals=1)
    mask = keep_largest(scores, zeros)
    assert int((~mask).sum()) == zeros
    if 0 < zeros < 24:
        assert float(scores[mask].min()) >= float(scores[~mask].max())


def test_blocks_add_up_and_spread_again() -> None:
    scores = torch.arange(24.0).reshape(4, 6)
    sums = block_sums(scores, 2)
    assert sums.tolist() == [[14, 22, 30], [62, 70, 78]]
    spread = spread_blocks(sums > 25, 2)
    assert spread.shape == scores.shape
    assert spread[:2].any(0).tolist() == [False] * 4 + [True] * 2 and bool(spread[2:].all())


@pytest.mark.parametrize("shape", [(8, 16), (8, 4, 3, 2)])
def test_a_weight_as_a_matrix_and_back(shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    matrix = to_matrix(weight)
    assert torch.equal(from_matrix(matrix, weight), weight)
    assert torch.equal(matrix[:, :4], weight.reshape(8, shape[1], -1)[:, :4, 0])


def test_patterns_read_back_as_they_are_written() -> None:
    for text in ("2:4", "1:16", "block16", "block32", "unstructured"):
        assert str(parse_pattern(text)) == text
    assert [parse_pattern(t).on_tensor_cores for t in ("2:4", "4:8", "block16")] == [
        True, False, False,
    ]  # fmt: skip
    with pytest.raises(UsageError, match="wanted n:m"):
        parse_pattern("2:4 ")


# ── scores ────────────────────────────────────────────────────────────────────────────────────


def test_lamp_against_its_formula() -> None:
    weight = random(5, 7)
    scores = weight.square()
    wanted = [float(s / scores[scores >= s].sum()) for s in scores.flatten()]
    found = lamp_scores(scores)
    assert torch.allclose(found.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-5)
    assert float(found.max()) == 1.0
    assert bool((lamp_scores(torch.zeros(3)) == 0).all())


def test_shares() -> None:
    assert uniform_zeros({"a": 10, "b": 5}, 0.3) == {"a": 3, "b": 2}
    # One layer's scores are all alike, the other's lie in one weight: the rest of it goes first.
    even, uneven = torch.ones(10), torch.tensor([100.0] + [0.001] * 9)
    assert global_zeros({"even": even, "uneven": uneven}, 0.5)["uneven"] == 9


def test_wanda_with_known_norms() -> None:
    """A large weight on a small input loses to a small weight on a large one."""
    matrix = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    inputs = LayerInputs(squares=torch.tensor([0.01, 0.01, 1.0, 16.0]).double())
    scores = METHODS["wanda"].score(matrix, inputs, TWO_OF_FOUR)
    assert torch.allclose(scores.sqrt(), torch.tensor([[0.4, 0.3, 2.0, 4.0]]).double())
    new = prune_matrix(METHODS["wanda"], matrix, inputs, TWO_OF_FOUR, 0)
    assert new.tolist() == [[0.0, 0.0, 2.0, 1.0]]
    by_magnitude = prune_matrix(METHODS["magnitude"], matrix, inputs, TWO_OF_FOUR, 0)
    assert by_magnitude.tolist() == [[4.0, 3.0, 0.0, 0.0]]


def test_distortion_is_the_change_of_the_output() -> None:
    x, matrix, pattern = correlated(100, 12), random(6, 12, seed=3), Pattern("block", block=3)
    inputs = LayerInputs(gram=x.t() @ x / 100)
    scores = METHODS["distortion"].score(matrix, inputs, pattern)
    for row in range(2):
        for column in range(4):
            gone = matrix.clone()
            gone[3 * row : 3 * row + 3, 3 * column : 3 * column + 3] = 0
            wanted = (x @ (gone - matrix).t()).square().sum() / 100
            assert float(scores[row, column]) == pytest.approx(float(wanted), rel=1e-4)


def test_distortion_sees_that_weights_cancel() -> None:
    """A block whose inputs are equal and weights opposite does nothing, however large it is."""
    matrix = torch.tensor([[5.0, -5.0, 1.0, 1.0], [5.0, -5.0, 1.0, 1.0]])
    x = random(50, 1).expand(50, 4)
    inputs = LayerInputs(gram=x.t() @ x / 50)
    pattern = Pattern("block", block=2)
    new = prune_matrix(METHODS["distortion"], matrix, inputs, pattern, 1)
    assert new[:, :2].abs().max() == 0 and new[:, 2:].abs().min() == 1
    by_size = prune_matrix(METHODS["magnitude"], matrix, inputs, pattern, 1)
    assert output_error(matrix, new, x) < output_error(matrix, by_size, x)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_source_and_says_what_it_refuses(name: str) -> None:
    method = find_method(name)
    assert method.name == name and "rXiv" in method.source
    for text in ("2:4", "block16", "unstructured"):
        pattern = parse_pattern(text)
        if pattern.kind in method.patterns:
            method.check(pattern)
        else:
            with pytest.raises(UsageError, match=f"{name} makes no {text} zeros; use "):
                method.check(pattern)


# ── second order ──────────────────────────────────────────────────────────────────────────────


def test_one_pair_is_removed_as_least_squares_says() -> None:
    """With one group, the two that stay are those, of all six pairs, that fit the output best."""
    x, weight = correlated(400, 4), random(5, 4, seed=7)
    gram = x.t() @ x / len(x)
    found = obs_n_of_m(weight, gram, 2, 4, TINY)
    for row, new in zip(weight, found, strict=True):
        wanted = x @ row
        fits = {}
        for pair in ((a, b) for a in range(4) for b in range(a + 1, 4)):
            part = x[:, list(pair)]
            solution = torch.linalg.lstsq(part, wanted[:, None]).solution[:, 0]
            fits[pair] = (float((part @ solution - wanted).square().sum()), solution)
        best = min(fits, key=lambda pair: fits[pair][0])
        assert tuple(new.nonzero()[:, 0].tolist()) == best
        assert torch.allclose(new[list(best)], fits[best][1], atol=1e-3)


def test_the_last_group_is_the_least_squares_fit_of_what_the_others_left() -> None:
    """All updates together, lazy ones too, come to the optimum over what isn't settled."""
    x, weight = correlated(800, 136, seed=3), random(6, 136, seed=5)
    found = obs_n_of_m(weight, x.t() @ x / len(x), 2, 4, TINY)
    left = (
        x.double() @ (weight - found).double().t() + x[:, -4:].double() @ found[:, -4:].t().double()
    )
    for row in range(len(weight)):
        kept = found[row, -4:].nonzero()[:, 0]
        solution = torch.linalg.lstsq(x[:, -4:][:, kept].double(), left[:, row, None]).solution
        assert torch.allclose(found[row, -4:][kept].double(), solution[:, 0], atol=2e-3)


@pytest.mark.parametrize("column", [0, 3, 7])
def test_one_weight_is_removed_as_the_surgeon_says(column: int) -> None:
    """``dw = -w_j / [H_F^-1]_jj * H_F^-1 e_j`` over the columns F from j on (OBS, eq. 3)."""
    x = correlated(400, 8)
    gram = x.t() @ x / len(x)
    weight = random(1, 8, seed=2).sign() * 10
    weight[0, column] = 1e-3  # the one that goes
    found = obs_unstructured(weight, gram, 1, TINY)
    free = torch.linalg.inv(gram[column:, column:].double())
    wanted = weight.double().clone()
    wanted[0, column:] -= weight[0, column] / free[0, 0] * free[:, 0]
    wanted[0, column] = 0
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert int((found == 0).sum()) == 1 and float(found[0, column]) == 0


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "unstructured"])
@pytest.mark.parametrize("columns", [64, 264])  # less and more than one lazy update
def test_second_order_beats_wanda_and_magnitude_on_correlated_inputs(
    pattern: str, columns: int
) -> None:
    x, matrix = correlated(2000, columns), random(24, columns, seed=9)
    unseen = correlated(2000, columns)[1000:]
    gram = x[:1000].t() @ x[:1000] / 1000
    inputs = LayerInputs(gram.diagonal().double(), gram, 0.01)
    wanted, zeros = parse_pattern(pattern), matrix.numel() // 2
    errors = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        new = prune_matrix(METHODS[name], matrix, inputs, wanted, zeros)
        errors[name] = output_error(matrix, new, unseen)
    assert errors["sparsegpt"] < 0.5 * min(errors["wanda"], errors["magnitude"])


def test_lazy_updates_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, matrix = correlated(600, 40), random(6, 40, seed=4)
    gram = x.t() @ x / 600
    wanted = obs_n_of_m(matrix, gram, 2, 4, 0.01)
    free = obs_unstructured(matrix, gram, 100, 0.01)
    monkeypatch.setattr("deploykit.prune.sparsity_obs._COLUMNS", 8)
    assert torch.allclose(obs_n_of_m(matrix, gram, 2, 4, 0.01), wanted, atol=1e-4)
    monkeypatch.setattr("deploykit.prune.sparsity_obs._COLUMNS", 40)
    assert torch.allclose(obs_unstructured(matrix, gram, 100, 0.01), free, atol=1e-5)


def test_a_dead_input_loses_its_weights_first() -> None:
    x = correlated(300, 8)
    x[:, 1] = x[:, 6] = 0
    gram = x.t() @ x / 300
    found = obs_n_of_m(random(6, 8, seed=1).abs() + 1, gram, 3, 4, 0.01)
    assert bool((found[:, [1, 6]] == 0).all()) and int((found == 0).sum()) == 12


def test_statistics_of_a_convolution_are_those_of_its_patches() -> None:
    net = nn.Conv2d(3, 4, (2, 3), 2, padding=1, dilation=(1, 2))
    model = captured(nn.Sequential(net, nn.Flatten()), size=12)
    (node,) = nodes_of(model.graph_module, torch.ops.aten.conv2d.default)
    statistics = InputStatistics(node, net.weight, gram=True)
    x = images(3, 12)
    for part in x.split(2):
        statistics.update([part, net.weight, net.bias, *node.args[3:]])
    patches = torch.nn.functional.unfold(x, (2, 3), dilation=(1, 2), padding=1, stride=2)
    # unfold gives channels, then positions; the matrix has positions, then channels
    rows = patches.reshape(3, 3, 6, -1).permute(0, 3, 2, 1).reshape(-1, 18)
    assert statistics.rows == len(rows)
    assert torch.allclose(statistics.mean.float(), rows.mean(0), atol=1e-5)
    assert torch.allclose(statistics.squares.float(), rows.square().mean(0), atol=1e-5)
    gram = rows.t() @ rows / len(rows)
    assert torch.allclose(statistics.gram(centred=False), gram, atol=1e-5)
    assert torch.allclose(statistics.gram(centred=True), rows.t().cov(correction=0), atol=1e-5)
    output = to_matrix(net.weight) @ rows.t() + net.bias[:, None]
    wanted = net(x).flatten(2).permute(1, 0, 2).reshape(4, -1)
    assert torch.allclose(output, wanted, atol=1e-5)
