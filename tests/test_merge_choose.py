"""Choosing how many tokens merge, from data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.prune.merge_choose import BlockDamage, choose_merging, disagreement, share_out
from deploykit.prune.merge_options import MergeOptions
from tests.graphs import batches, captured, images, tiny_vit

OPTIONS = MergeOptions(least_tokens=0)


def damage(*points: tuple[int, float], most: int = 8, saved: float = 10.0) -> BlockDamage:
    return BlockDamage(most, ((0, 0.0), *points), saved)


def test_tokens_merge_where_they_do_least_damage() -> None:
    blocks = {0: damage((8, 8.0)), 1: damage((8, 0.8)), 2: damage((8, 4.0))}
    assert share_out(blocks, 40, 17, 1) == {0: 0, 1: 4, 2: 0}
    # at most half of what reaches a block: 8 of 16, and then 4 of 8
    assert share_out(blocks, 120, 17, 1) == {0: 0, 1: 8, 2: 4}
    assert share_out(blocks, 10_000, 17, 1) is None


def test_damage_counts_against_what_is_saved() -> None:
    blocks = {0: damage((8, 8.0), saved=100), 1: damage((8, 4.0), saved=10)}
    assert share_out(blocks, 100, 17, 1) == {0: 1, 1: 0}


def test_a_steeper_later_part_is_left_to_another_block() -> None:
    blocks = {0: damage((4, 0.4), (8, 8.0)), 1: damage((8, 4.0))}
    assert share_out(blocks, 60, 33, 1) == {0: 4, 1: 2}


def test_an_earlier_block_leaves_later_ones_their_tokens() -> None:
    blocks = {0: damage((8, 8.0)), 1: damage((8, 0.8))}
    amounts = share_out(blocks, 110, 17, 1)
    assert amounts is not None
    assert amounts[0] + amounts[1] == 11
    assert amounts[1] <= (16 - amounts[0]) // 2


@pytest.fixture(scope="module")
def model() -> CapturedModel:
    return captured(tiny_vit())


def test_the_largest_reduction_within_the_limit_is_chosen(model: CapturedModel) -> None:
    ladder = (0.02, 0.05, 0.1, 0.15)
    seen: list[float] = []

    def evaluate(candidate: CapturedModel) -> float:
        """A drop that grows with the distance from the model."""
        x = images(4, seed=5)
        with torch.no_grad():
            change = candidate.graph_module(x) - model.graph_module(x)
        seen.append(float(change.abs().mean()))
        return seen[-1]

    loose, record = choose_merging(model, batches(), evaluate, 1e9, OPTIONS, ladder=ladder)
    assert record.details["macs_after"] < record.details["macs_before"]
    assert "10 %" in record.details["drops_tried"]
    again, second = choose_merging(model, batches(), evaluate, 1e9, OPTIONS, ladder=ladder)
    x = images(2)
    assert torch.equal(loose.graph_module(x), again.graph_module(x))
    assert record == second
    assert max(seen) > 0

    nothing, record = choose_merging(model, batches(), evaluate, -1.0, OPTIONS, ladder=ladder)
    assert torch.equal(nothing.graph_module(x), model.graph_module(x))
    assert "no tokens merge" in record.summary


def test_without_labels_the_models_own_answers_count(model: CapturedModel) -> None:
    evaluate = disagreement(model, batches())
    assert evaluate(model) == 0
    with torch.no_grad():
        flipped = replace(model, graph_module=lambda x: -model.graph_module(x))
    assert evaluate(flipped) == 100


def test_local_merging_is_not_chosen_from_data(model: CapturedModel) -> None:
    with pytest.raises(UsageError, match="not locally"):
        choose_merging(model, batches(), lambda _: 0.0, 1.0, replace(OPTIONS, place="local"))
