"""Bits under a budget, against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploykit.errors import UsageError
from deploykit.quant.allocate import Table, allocate, total

WIDTHS = ("w8a8", "w6a6", "w4a4")
Case = tuple[dict[str, dict[str, float]], dict[str, dict[str, float]], float]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to five layers with any scores, integer costs that fall, and a budget that can be kept."""
    scores, costs = {}, {}
    for index in range(draw(st.integers(1, 5))):
        widths = WIDTHS[: draw(st.integers(1, 3))]
        layer = f"layer{index}"
        figures = st.floats(0, 10, allow_subnormal=False)
        scores[layer] = {width: draw(figures) for width in widths}
        falling = sorted((draw(st.integers(0, 50)) for _ in widths), reverse=True)
        costs[layer] = dict(zip(widths, map(float, falling), strict=True))
    least = sum(min(row.values()) for row in costs.values())
    most = sum(max(row.values()) for row in costs.values())
    return scores, costs, draw(st.floats(least, most + 1))


def best_of_all(scores: Table, costs: Table, budget: float) -> float:
    choices = [[(layer, width) for width in row] for layer, row in scores.items()]
    tried = (dict(choice) for choice in itertools.product(*choices))
    return min(total(scores, c) for c in tried if total(costs, c) <= budget)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_ilp_is_the_best_there_is_and_both_keep_the_budget(case: Case) -> None:
    scores, costs, budget = case
    exact = allocate(scores, costs, budget, "ilp")
    greedy = allocate(scores, costs, budget, "greedy")
    for chosen in (exact, greedy):
        assert set(chosen) == set(scores)
        assert total(costs, chosen) <= budget
    assert total(scores, exact) <= total(scores, greedy)
    assert total(scores, exact) <= best_of_all(scores, costs, budget) + 1e-5


def test_ilp_beats_greedy_where_the_cheap_step_is_a_trap() -> None:
    """Greedy's first step, the best for its price, saves too little and makes a second one due."""
    scores = {"a": {"w8a8": 0.0, "w4a4": 1.0}, "b": {"w8a8": 0.0, "w4a4": 5.0}}
    costs = {"a": {"w8a8": 4.0, "w4a4": 3.0}, "b": {"w8a8": 10.0, "w4a4": 6.0}}
    assert allocate(scores, costs, 10.0, "ilp") == {"a": "w8a8", "b": "w4a4"}
    assert allocate(scores, costs, 10.0, "greedy") == {"a": "w4a4", "b": "w4a4"}


def test_greedy_lowers_the_layer_with_the_least_rise_for_its_saving() -> None:
    scores = {"a": {"w8a8": 0.0, "w4a4": 1.0}, "b": {"w8a8": 0.0, "w4a4": 2.0}}
    costs = {"a": {"w8a8": 8.0, "w4a4": 4.0}, "b": {"w8a8": 80.0, "w4a4": 40.0}}
    assert allocate(scores, costs, 84.0, "greedy") == {"a": "w8a8", "b": "w4a4"}


def test_a_budget_met_by_the_widest_changes_nothing() -> None:
    scores = {"a": {"w8a8": 0.5, "w4a4": 1.0}}
    costs = {"a": {"w8a8": 8.0, "w4a4": 4.0}}
    assert allocate(scores, costs, 8.0, "ilp") == {"a": "w8a8"}
    assert allocate(scores, costs, 8.0, "greedy") == {"a": "w8a8"}


def test_layers_of_no_cost_stay_at_their_widest() -> None:
    """An attention matmul has no weights: narrowing it saves none."""
    scores = {"a": {"w8a8": 0.0, "w4a4": 9.0}, "matmul": {"w8a8": 0.0, "w4a4": 0.1}}
    costs = {"a": {"w8a8": 8.0, "w4a4": 4.0}, "matmul": {"w8a8": 0.0, "w4a4": 0.0}}
    for method in ("ilp", "greedy"):
        assert allocate(scores, costs, 4.0, method)["matmul"] == "w8a8"


def test_a_budget_of_a_billion_bits_is_kept_to_the_bit() -> None:
    """One part in 1e9 is far inside the solver's own tolerance."""
    layers = [f"l{i}" for i in range(40)]
    scores = {name: {"w8a8": 0.0, "w4a4": 1.0 + i / 100} for i, name in enumerate(layers)}
    costs = {
        name: {"w8a8": 8.0 * (25_000_001 + i), "w4a4": 4.0 * (25_000_001 + i)}
        for i, name in enumerate(layers)
    }
    narrow = dict.fromkeys(layers[:20], "w4a4")
    budget = total(costs, {**dict.fromkeys(layers, "w8a8"), **narrow}) - 1
    chosen = allocate(scores, costs, budget, "ilp")
    assert total(costs, chosen) <= budget
    # Twenty narrow layers, but other ones (the twenty-first of them pays 4 more bits a weight).
    assert total(scores, chosen) <= total(scores, allocate(scores, costs, budget, "greedy"))
    assert sum(width == "w4a4" for width in chosen.values()) == 20


def test_a_budget_that_cannot_be_kept_says_what_can() -> None:
    scores = {"a": {"w8a8": 0.0, "w4a4": 1.0}}
    costs = {"a": {"w8a8": 800.0, "w4a4": 400.0}}
    with pytest.raises(UsageError, match=r"budget 399 bytes .* least .* 400 bytes; raise"):
        allocate(scores, costs, 399.0, unit="bytes")


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="same layers"):
        allocate({"a": {"w8a8": 0.0}}, {"b": {"w8a8": 0.0}}, 1.0)
    with pytest.raises(ValueError, match="finite"):
        allocate({"a": {"w8a8": float("nan")}}, {"a": {"w8a8": 0.0}}, 1.0)
