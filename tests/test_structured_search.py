"""The search for widths, importances and predicted times, on figures made by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploykit.errors import MeasurementError
from deploykit.prune import structured_trace
from deploykit.prune.importance import IMPORTANCES, unit_scores
from deploykit.prune.importance_gradients import score_vector
from deploykit.prune.latency import LayerShape, latency_terms
from deploykit.prune.structured import StructureOptions, prune_structure
from deploykit.prune.structured_cost import Cost, Layer, Product, Width
from deploykit.prune.structured_groups import Group, Slice
from deploykit.prune.structured_search import choose_widths, options_of
from deploykit.prune.structured_trace import channel_groups
from tests.graphs import SIZE, batches, make_backbone, tiny_vit


def group(kind: str = "mlp", units: int = 16) -> Group:
    layer = nn.Linear(4, units)
    numbers = torch.arange(units)
    return Group("layer", kind, units, (Slice(layer, "weight", 0, numbers, numbers),))


def test_widths_are_multiples_down_to_the_floor() -> None:
    choice = options_of(group(units=20), torch.arange(20.0), 8, 0.75)
    assert choice.kept == (20, 16, 8)
    assert choice.lost.tolist() == [0, 0 + 1 + 2 + 3, sum(range(12))]
    assert options_of(group(units=3), torch.ones(3), 8, 0.75).kept == (3,)


def test_the_search_finds_what_trying_everything_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    choices = [
        options_of(group(units=32), torch.rand(32, generator=generator).sort().values, 8, 0.75)
        for _ in range(4)
    ]
    own = [Width(((32, (index,)),)) for index in range(4)]
    cost = Cost([Product(float(index + 1), (width,)) for index, width in enumerate(own)], 4)
    full = cost.total(np.ones(4))
    picked = choose_widths(choices, ["mlp"] * 4, cost, 0.6 * full, "none")

    def lost(indices: Sequence[int]) -> float:
        return sum(float(c.lost[i]) for c, i in zip(choices, indices, strict=True))

    def total(indices: Sequence[int]) -> float:
        return cost.total(np.array([c.shares[i] for c, i in zip(choices, indices, strict=True)]))

    possible = [
        indices
        for indices in itertools.product(*(range(len(c.kept)) for c in choices))
        if total(indices) <= 0.6 * full
    ]
    assert total(picked) <= 0.6 * full
    assert lost(picked) <= 1.1 * min(map(lost, possible))


def test_widths_that_save_no_time_are_kept() -> None:
    """The kernel takes as long for 8 to 16 channels as for 16: only going below 8 pays."""
    width = Width(((32, (0,)),)), Width(((32, (1,)),))

    def staircase(shapes: Sequence[LayerShape]) -> list[float]:
        return [0.1 + (shape.sizes[1] > 24 if shape.fixed == (1,) else shape.sizes[1] / 32)
                for shape in shapes]  # fmt: skip

    constant = Width(((4, ()),))
    layers = [
        Layer("stairs", "linear", (1,), (constant, width[0]), 1.0),
        Layer("slope", "linear", (2,), (constant, width[1]), 1.0),
    ]
    cost = Cost(latency_terms(layers, 2, staircase), 2)
    assert cost.total(np.ones(2)) == pytest.approx(2.2)
    choices = [options_of(group(units=32), torch.ones(32), 8, 0.75)] * 2
    picked = choose_widths(choices, ["mlp", "mlp"], cost, 1.3, "none")
    assert [choices[0].kept[i] for i in picked] == [24, 32], "one step of the stairs saves it all"


def test_times_are_interpolated_between_measured_widths_and_asked_once() -> None:
    asked: list[LayerShape] = []

    def measure(shapes: Sequence[LayerShape]) -> list[float]:
        asked.extend(shapes)
        return [float(np.prod(shape.sizes)) for shape in shapes]

    a, b, free = Width(((64, (0,)),)), Width(((32, (1,)),)), Width(((8, ()),))
    layers = [Layer("one", "conv", (7, 7, 1, 1), (a, b), 1.0)] * 2
    layers.append(Layer("whole", "linear", (3,), (free, free), 1.0))
    heads = Width(((4, (0,)),))
    q, v = Width(((64, (0, 1)),)), Width(((64, (0,)),))
    layers.append(Layer("attention", "attention", (1, 9, 9), (q, v), 81.0, heads))
    terms = latency_terms(layers, 2, measure)
    assert len(asked) == len(set(asked)) == 16 + 1 + 9
    shares = np.array([[1.0, 1.0], [0.6, 1.0], [0.6, 0.8]])
    assert terms[0].at(shares) == pytest.approx([64 * 32, 0.6 * 64 * 32, 0.48 * 64 * 32])
    assert terms[2].at(shares).tolist() == [64.0] * 3
    assert terms[3].at(shares) == pytest.approx([4 * 16 * 16, 0.6 * 1024, 0.48 * 1024], rel=0.02)
    assert terms[3].groups == {0, 1}


@pytest.mark.parametrize("times", [[], [0.0], [float("nan")]])
def test_times_that_are_none_are_refused(times: list[float]) -> None:
    layer = Layer("a", "linear", (1,), (Width(((4, ()),)), Width(((4, ()),))), 1.0)
    with pytest.raises(MeasurementError, match="wanted a time for each of 1 layers"):
        latency_terms([layer], 0, lambda _: times)


def test_a_latency_budget_takes_from_the_slow_layers() -> None:
    """Where only the MLPs' layers take time, heads stay."""

    def measure(shapes: Sequence[LayerShape]) -> list[float]:
        slow = [s.kind == "linear" and 128 in (s.fixed + s.sizes) for s in shapes]
        return [
            np.prod(shape.sizes) / 1000 if is_slow or max(shape.sizes) > 96 else 1e-3
            for shape, is_slow in zip(shapes, slow, strict=True)
        ]

    options = StructureOptions(
        ratio=0.2, budget="latency", scope=("mlp", "heads"), importance="magnitude",
    )  # fmt: skip
    _, record = prune_structure(make_backbone(tiny_vit()), options, batches(SIZE), measure=measure)
    before, after = record.details["cost"]
    assert after <= 0.8 * before
    widths = record.details["widths"]
    assert all(pair[0] == pair[1] for name, pair in widths.items() if name.endswith(":heads"))
    assert any(pair[0] > pair[1] for name, pair in widths.items() if name.endswith(":mlp"))


def test_lamp_scores_follow_the_formula() -> None:
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0], [1.0, 2.0]])
    scores = IMPORTANCES["dimap"].of_weights(weight, None)
    squares = weight.double().square()
    expected = [
        float(value / squares[squares >= value].sum()) if value else 0.0
        for value in squares.flatten()
    ]
    assert scores.flatten().tolist() == pytest.approx(expected)


def test_random_gradients_have_the_covariance_of_the_fisher_matrix() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0]], dtype=torch.float64).expand(200_000, 3)
    drawn = score_vector(logits, torch.Generator().manual_seed(0))
    p = logits[0].softmax(0)
    expected = torch.diag(p) - torch.outer(p, p)
    assert torch.allclose(drawn.T @ drawn / len(drawn), expected, atol=3e-3)


@pytest.mark.parametrize("name", sorted(IMPORTANCES))
def test_every_importance_is_zero_for_dead_units_and_never_negative(name: str) -> None:
    importance = IMPORTANCES[name]
    one = group()
    layer = one.slices[0].owner
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.weight[3] = 0
    layer.weight.grad = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    (scores,) = unit_scores([one], importance)
    assert scores.shape == (1, 16)
    assert scores[0, 3] == 0
    assert bool((scores >= 0).all())
    assert int((scores == 0).sum()) == 1


# ── tracing ───────────────────────────────────────────────────────────────────────────────────


class _Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.ReLU(), nn.Conv2d(16, 8, 1))
        self.tail = nn.Sequential(nn.Linear(8 * 16 * 16, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.maps(x).flatten(1))


def test_reshapes_that_multiply_channels_end_the_trace_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its parts are traced then."""
    example = torch.zeros(1, 3, SIZE, SIZE)
    groups, declined = channel_groups(_Flat().eval(), example)
    assert {g.name for g in groups} == {"maps.0", "maps.2", "tail.0"} and not declined
    monkeypatch.setattr(structured_trace, "_MOST_CHANNELS", 2000)  # 8 channels of 256 are more
    groups, declined = channel_groups(_Flat().eval(), example)
    assert {g.name for g in groups} == {"maps.0", "tail.0"}
    assert declined["embedding"].endswith("its reshapes can't be followed")
