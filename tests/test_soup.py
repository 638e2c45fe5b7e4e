"""Model soups."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.prune.recover import QatOptions
from deploykit.prune.recover_soup import recover_soup
from deploykit.prune.soup import soup
from tests.graphs import images
from tests.recovery import QUICK, Waves, cnn, damaged, kl, same, sparse_vit, vit, weights


def moved(model: CapturedModel, name: str, amount: float) -> CapturedModel:
    model = model.copy()
    with torch.no_grad():
        weights(model)[name] += amount
    return model


def test_uniform_is_the_mean_of_every_tensor() -> None:
    ingredients = [damaged(cnn(), noise) for noise in (0.0, 0.1, 0.4)]
    mixed, record = soup(ingredients, "uniform")
    for name, tensor in weights(mixed).items():
        tables: list[Tensor] = [weights(model)[name] for model in ingredients]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack(tables).mean(0))
    assert record.details["taken"] == [0, 1, 2]
    assert same(ingredients[0], cnn()), "ingredients are left as they were"
    assert str(mixed.graph_module.graph) == str(cnn().graph_module.graph)
    assert mixed.graph_module(images(2)).isfinite().all()


def test_a_soup_of_one_is_itself() -> None:
    for mode in ("uniform", "greedy"):
        mixed, _ = soup([cnn()], mode, lambda _: 0.0)
        assert same(mixed, cnn()) and mixed is not cnn()


def test_greedy_takes_in_what_helps_and_leaves_out_what_does_not() -> None:
    """Errors of opposite sign cancel; the third, far away, would spoil the average."""
    base, name = cnn(), "head.bias"
    ingredients = [moved(base, name, 1.0), moved(base, name, 30.0), moved(base, name, -1.5)]

    def score(model: CapturedModel) -> float:
        return -float((weights(model)[name] - weights(base)[name]).abs().max())

    mixed, record = soup(ingredients, "greedy", score)
    assert record.details["taken"] == [0, 2]
    assert score(mixed) == pytest.approx(-0.25)
    assert "2 of 3" in record.summary


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_never_worse_than_its_best_ingredient(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    noises = torch.rand(4, generator=generator).tolist()
    ingredients = [damaged(cnn(), noise) for noise in noises]

    def score(model: CapturedModel) -> float:
        return -kl(model, cnn())

    mixed, record = soup(ingredients, "greedy", score)
    assert score(mixed) >= max(map(score, ingredients))
    assert record.details["score"] == pytest.approx(score(mixed))


def test_masks_survive() -> None:
    ingredients = [sparse_vit(), sparse_vit().copy()]
    with torch.no_grad():
        for tensor in weights(ingredients[1]).values():
            tensor *= 1.01
    mixed, _ = soup(ingredients, "uniform")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(weights(mixed)[name] == 0, weights(sparse_vit())[name] == 0)
    other = sparse_vit().copy()
    with torch.no_grad():
        weights(other)[name].copy_(weights(other)[name].roll(1, dims=1))
    with pytest.raises(UsageError, match=r"zeros of blocks.0.mlp.fc1.weight lie elsewhere"):
        soup([sparse_vit(), other], "uniform")


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(UsageError, match="no models"):
        soup([], "uniform")
    with pytest.raises(UsageError, match="greedy needs a score"):
        soup([cnn(), cnn()], "greedy")
    with pytest.raises(UsageError, match="model 1 is no recovery of the same student"):
        soup([cnn(), vit()], "uniform")
    wide = cnn().copy()
    wide.graph_module.head.weight = torch.nn.Parameter(torch.zeros(10, 25))
    with pytest.raises(UsageError, match=r"head.weight has another shape"):
        soup([cnn(), wide], "uniform")


def test_recoveries_become_a_soup(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    short = replace(QUICK, epochs=1)
    variants = [short, replace(short, seed=1), replace(short, lr=3e-3)]
    student = damaged(cnn())
    mixed, records = recover_soup(student, cnn(), variants, Waves(), checkpoint=tmp_path)
    assert [record.name for record in records] == ["recover"] * 3 + ["soup"]
    scores = records[-1].details["scores"]
    held_out = [record.details["best"]["kl"] for record in records[:3]]
    assert scores == pytest.approx([-kl for kl in held_out])
    assert records[-1].details["score"] >= max(scores)
    assert kl(mixed, cnn()) < kl(student, cnn())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"recovery-{i}" for i in range(3)]


def test_recoveries_that_cannot_be_a_soup_are_refused_before_any_work() -> None:
    for variants, message in [
        ([], "no recoveries"),
        ([QUICK, replace(QUICK, split_seed=1)], "hold out the same"),
        ([QUICK, replace(QUICK, qat=QatOptions())], "quantisation-aware"),
    ]:
        with pytest.raises(UsageError, match=message):
            recover_soup(cnn(), cnn(), variants, Waves(0))
