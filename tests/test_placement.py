"""Which layers go back to float: made-up tables, judged by arithmetic alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploykit.layer_profile import LayerCost
from deploykit.layer_verdict import float_layers_option, keep_in_float, verdict_lines
from deploykit.placement import Comparison, LayerDelta, choose_float, compare_layers
from deploykit.placement_search import Attempt, Trial, decide, search
from deploykit.recipe_io import apply_overrides
from deploykit.types import LayerProfile, LayerTime


def delta(name: str, before: float, after: float, noise: float = 0.0) -> LayerDelta:
    change = after - before
    return LayerDelta(name, before, after, change - noise, change + noise, "int8", 0.0, 0.0)


def table(*layers: LayerDelta, rest: tuple[float, float] = (0.0, 0.0)) -> Comparison:
    return Comparison(layers, *rest)


times = st.floats(0.001, 100)


@given(
    st.lists(st.tuples(times, times, st.floats(0, 10)), min_size=1, max_size=12),
    st.tuples(st.floats(0, 50), st.floats(0, 50)),
    st.sets(st.integers(0, 11)),
)
def test_the_chosen_set_is_never_predicted_slower_than_float(
    rows: list[tuple[float, float, float]], rest: tuple[float, float], before: set[int]
) -> None:
    layers = [delta(f"l{i}", *row) for i, row in enumerate(rows)]
    comparison = table(*layers, rest=rest)
    already = {layer.name for i, layer in enumerate(layers) if i in before}
    chosen = choose_float(comparison, already)
    assert comparison.predicted(chosen) <= comparison.float_ms * (1 + 1e-12)
    assert already <= chosen <= {layer.name for layer in layers}


def test_only_layers_slower_beyond_the_noise_go_back_while_the_rest_wins() -> None:
    comparison = table(delta("slow", 1, 2), delta("unsure", 1, 1.1, noise=0.2), delta("fast", 9, 4))
    assert choose_float(comparison) == {"slow"}
    assert [layer.name for layer in comparison.slower] == ["slow"]
    assert comparison.predicted({"slow"}) == pytest.approx(1 + 1.1 + 4)


def test_unsure_layers_go_back_where_that_alone_makes_it_pay() -> None:
    comparison = table(delta("unsure", 1, 3, noise=2.5), delta("fast", 3, 2))
    assert choose_float(comparison) == {"unsure"}


def test_every_layer_goes_back_where_none_pays() -> None:
    comparison = table(delta("a", 1, 2), delta("b", 3, 3), rest=(1, 1.5))
    assert choose_float(comparison) == {"a", "b"}
    assert comparison.predicted({"a", "b"}) == comparison.float_ms == 5


def test_layers_are_compared_round_by_round() -> None:
    """A drift that hits both files in a round says nothing about the layer."""
    before = {"a": LayerCost("a", "Conv", "float32", {"compute": 2.0}, (1.0, 2.0, 9.0)),
              "": LayerCost("", "", "", {"other": 1.0}, (1.0, 1.0, 1.0))}  # fmt: skip
    parts = {"compute": 2.0, "quantise": 0.5, "reformat": 0.25}
    after = {"a": LayerCost("a", "QLinearConv", "int8", parts, (1.5, 2.75, 9.75)),
             "new": LayerCost("new", "", "", {"other": 4.0}, (4.0, 4.0, 4.0))}  # fmt: skip
    comparison = compare_layers(before, after)
    (layer,) = comparison.layers
    assert (layer.low, layer.high) == pytest.approx((0.5, 0.75))
    assert layer.slower
    assert (layer.quantise_ms, layer.reformat_ms) == (0.5, 0.25)
    assert (comparison.float_rest_ms, comparison.quantised_rest_ms) == (1.0, 4.0)
    assert compare_layers(before, after, only=["b"]).layers == ()


def attempts(
    real: Callable[[frozenset[str]], float], comparison: Callable[[frozenset[str]], Comparison]
) -> Callable[[frozenset[str], Attempt | None], Attempt]:
    """A machine on which a placement's ratio is ``real``, known to one percent."""

    def attempt(floats: frozenset[str], best: Attempt | None) -> Attempt:
        ratio = real(floats)
        trial = Trial(
            float_layers=sorted(floats), p50_ms=ratio, ratio=ratio, ratio_low=ratio - 0.01,
            ratio_high=ratio + 0.01, noisy=False,
            best_ratio=None if best is None else real(best.floats),
        )  # fmt: skip
        return Attempt(floats, trial, comparison(floats))

    return attempt


LAYERS = {"a": (1.0, 3.0), "b": (1.0, 2.0), "c": (4.0, 1.0), "d": (4.0, 1.0)}


def measured(floats: frozenset[str]) -> Comparison:
    return table(
        *(
            delta(n, before, before if n in floats else after)
            for n, (before, after) in LAYERS.items()
        )
    )


def whole(floats: frozenset[str]) -> float:
    return measured(floats).quantised_ms / measured(floats).float_ms


def test_the_search_puts_slow_layers_back_and_stops() -> None:
    best, tried = search(attempts(whole, measured), rounds=4)
    assert [one.floats for one in tried] == [frozenset(), {"a", "b"}]
    assert best.floats == {"a", "b"}
    made = decide("cpu", "original", len(LAYERS), best, tried)
    assert made.quantise
    assert made.float_layers == ["a", "b"]
    assert "2 of 4 layers stay in float: 0.40" in made.reason


def test_where_all_together_is_slower_half_of_it_is_tried() -> None:
    """A float layer between integer ones costs conversions that no profile could foresee."""

    def real(floats: frozenset[str]) -> float:
        return whole(floats) + (0.5 if "b" in floats else 0.0)

    best, tried = search(attempts(real, measured), rounds=4)
    assert [one.floats for one in tried] == [frozenset(), {"a", "b"}, {"a"}]
    assert best.floats == {"a"}
    assert len(search(attempts(real, measured), rounds=2)[1]) == 2


def test_where_no_trial_beats_float_the_float_file_ships() -> None:
    best, tried = search(attempts(lambda floats: 1.2 - 0.1 * len(floats), measured), rounds=4)
    made = decide("cpu", "original", len(LAYERS), best, tried)
    assert not made.quantise
    assert made.float_layers == []
    assert "quantisation doesn't pay on cpu" in made.reason
    record = made.record()
    assert record.summary == made.reason
    assert [trial["ratio"] for trial in record.details["trials"]] == pytest.approx([1.2, 1.0])


def test_an_interval_around_one_is_no_gain() -> None:
    best, tried = search(attempts(lambda _: 0.995, lambda _: table(delta("a", 2, 1))), rounds=4)
    assert not decide("cpu", "original", 1, best, tried).quantise


def test_the_option_is_one_that_the_command_line_takes() -> None:
    option = float_layers_option(["blocks.0.attn.qkv", "odd[0]"], before=["*.head"])
    flag, value = shlex.split(option)
    assert flag == "--set"
    found = apply_overrides({}, [value])
    assert found == {"quantize": {"float_layers": ["*.head", "blocks.0.attn.qkv", "odd[[]0]"]}}


def profile(name: str, rows: list[tuple[str, str, str, float]]) -> LayerProfile:
    total = sum(ms for *_, ms in rows)
    return LayerProfile(
        artifact=name, target="cpu", total_ms=total,
        layers=[
            LayerTime.model_validate(
                {"layer": layer, "kind": kind, "kernel": "k", "op": "Conv", "precision": precision,
                 "ms": ms, "rounds_ms": [ms, ms * 1.001], "share": ms / total}
            )
            for layer, kind, precision, ms in rows
        ],
    )  # fmt: skip


def test_the_verdict_names_the_culprits_and_the_line_that_mends_it() -> None:
    floats = profile("original", [("stem", "compute", "float32", 1.0),
                                  ("body", "compute", "float32", 8.0)])  # fmt: skip
    narrow = profile("compressed", [("stem", "quantise", "float32", 1.5),
                                    ("stem", "compute", "float32", 1.0),
                                    ("body", "reformat", "int8", 0.5),
                                    ("body", "compute", "int8", 7.0)])  # fmt: skip
    text = "\n".join(verdict_lines(floats, narrow))
    assert "compressed is slower than original on cpu: 10 ms against 9 ms" in text
    assert "1.5 ms (15%) goes into codes and back" in text
    assert "0.5 ms (5%) more than in float into moving values" in text
    assert "computed in float: stem" in text
    assert "slower in compressed than in original: stem (+1.5 ms, 2.5 against 1)" in text
    assert """--set 'quantize.float_layers=["stem"]'""" in text
    worse = profile("compressed", [("stem", "compute", "int8", 2.0),
                                   ("body", "compute", "int8", 9.0)])  # fmt: skip
    assert "ship the float file" in verdict_lines(floats, worse)[-1]
    better = profile("compressed", [("stem", "compute", "int8", 0.5),
                                    ("body", "compute", "int8", 4.0)])  # fmt: skip
    (line,) = verdict_lines(floats, better)
    assert "faster" in line


def test_what_is_in_float_already_is_not_named_again() -> None:
    assert keep_in_float(table(delta("a", 1, 2), delta("b", 9, 1)), already={"a"}) == []
