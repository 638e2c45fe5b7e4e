"""Predictions, and the interval of a paired drop."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor

from deploykit.backbones.build import build_backbone
from deploykit.data import open_dataset
from deploykit.evaluate import paired_accuracy, paired_interval, top1_and_predictions
from deploykit.recipe import ModelSection
from deploykit.types import Preprocessing

Z = 1.959963984540054
GREY = Preprocessing(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_predictions_follow_the_images_and_report_progress(tmp_path: Path) -> None:
    values = np.arange(0, 250, 25, dtype=np.uint8)
    packed = np.broadcast_to(values[:, None, None], (10, 8, 8))
    np.savez(tmp_path / "p.npz", images=packed, labels=np.arange(10))
    images = open_dataset(tmp_path / "p.npz", GREY, labelled=True, num_classes=10)

    def run(batch: Tensor) -> Tensor:
        level = (batch[:, 0, 0, 0] * 255 / 25).round().long()
        return torch.nn.functional.one_hot(level, 10).float()

    seen: list[int] = []
    predictions = top1_and_predictions(run, images, 4, seen.append)
    assert predictions.dtype == torch.int64
    assert predictions.tolist() == list(range(10))
    assert seen == [4, 8, 10]


def test_scores_that_are_not_finite_are_never_right(tmp_path: Path) -> None:
    packed = np.zeros((3, 8, 8), np.uint8)
    np.savez(tmp_path / "p.npz", images=packed, labels=np.zeros(3, np.int64))
    images = open_dataset(tmp_path / "p.npz", GREY, labelled=True, num_classes=2)
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, 0.0], [1.0, 0.0], [inf, 0.0]])
    assert top1_and_predictions(lambda _: scores, images, 3).tolist() == [-1, 0, -1]
    with pytest.raises(ValueError, match="wanted scores"):
        top1_and_predictions(lambda x: x[:, 0], images, 3)


def test_paired_accuracy_counts_what_changed() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    original = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 0])  # 8 right
    pred = torch.tensor([1, 1, 2, 3, 4, 5, 6, 0, 8, -1])  # lost 0 and 7, gained 8
    result = paired_accuracy("compressed", labels, original, pred, "toy, 10 images")
    assert (result.lost, result.gained, result.images) == (2, 1, 10)
    assert result.top1_original == pytest.approx(80.0)
    assert result.top1 == pytest.approx(70.0)
    assert result.drop == pytest.approx(10.0)
    low, high = paired_interval(2, 1, 10)
    assert result.drop_low == pytest.approx(100 * low)
    assert result.drop_high == pytest.approx(100 * high)
    assert result.drop_low < 10 < result.drop_high
    with pytest.raises(ValueError, match="one length"):
        paired_accuracy("x", labels, original[:5], pred, "")


def test_interval_of_textbook_data() -> None:
    # 12 and 2 discordant of 50: the plain Wald interval is 0.0642 to 0.3358
    low, high = paired_interval(12, 2, 50)
    assert (low, high) == pytest.approx((0.0611, 0.3447), abs=1e-4)
    # approval ratings (Agresti): 150 and 86 of 1600, where Wald, 0.0214 to 0.0586, is good
    low, high = paired_interval(150, 86, 1600)
    assert (low, high) == pytest.approx((0.0214, 0.0590), abs=1e-4)


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_no_change_still_has_a_width(count: int) -> None:
    width = Z**2 / (count + Z**2)  # closed form of the score interval for no discordant pairs
    assert paired_interval(0, 0, count) == pytest.approx((-width, width), abs=1e-6)


@pytest.mark.parametrize(("lost", "gained", "count"), [(5, 0, 5), (0, 7, 7), (1, 0, 1)])
def test_the_edges(lost: int, gained: int, count: int) -> None:
    low, high = paired_interval(lost, gained, count)
    assert -1.0 <= low <= (lost - gained) / count <= high <= 1.0
    assert high == 1.0 if lost else low == -1.0


counts = st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(0, 2000)).filter(
    lambda t: sum(t) > 0
)


@settings(max_examples=200, deadline=None)
@given(counts)
def test_the_interval_agrees_with_mcnemar_and_is_symmetric(case: tuple[int, int, int]) -> None:
    lost, gained, same = case
    count = lost + gained + same
    low, high = paired_interval(lost, gained, count)
    difference = (lost - gained) / count
    assert -1.0 <= low <= difference <= high <= 1.0
    mirrored = paired_interval(gained, lost, count)
    assert mirrored == pytest.approx((-high, -low), abs=1e-7)
    discordant = lost + gained
    statistic = abs(lost - gained) / discordant**0.5 if discordant else 0.0
    if abs(statistic - Z) > 1e-6:
        assert (low > 0 or high < 0) == (statistic > Z)


@pytest.mark.parametrize(("lost", "gained", "count"), [(9, 2, 1000), (12, 2, 50), (3, 8, 40)])
def test_the_ends_are_score_statistics_of_1_96(lost: int, gained: int, count: int) -> None:
    same = count - lost - gained
    for end in paired_interval(lost, gained, count):

        def unlikelihood(share: float, delta: float = end) -> float:
            """Minus the log likelihood, with ``share`` gained and share + delta lost."""
            parts = ((gained, share), (lost, share + delta), (same, 1 - 2 * share - delta))
            return -sum(n * float(np.log(max(p, 1e-300))) for n, p in parts)

        bounds = (max(0.0, -end) + 1e-12, (1 - end) / 2 - 1e-12)
        options = {"xatol": 1e-12}
        share = minimize_scalar(unlikelihood, bounds=bounds, method="bounded", options=options).x
        variance = count * (2 * share + end - end**2)
        assert abs(lost - gained - count * end) / variance**0.5 == pytest.approx(Z, abs=1e-3)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = generator.multinomial(200, [0.05, 0.02, 0.93], size=2000)
    kinds, repeats = np.unique(draws[:, :2], axis=0, return_counts=True)
    covered = 0
    for (lost, gained), times in zip(kinds, repeats, strict=True):
        low, high = paired_interval(int(lost), int(gained), 200)
        covered += int(times) * (low <= 0.03 <= high)
    assert 0.93 < covered / 2000 < 0.975


@pytest.mark.parametrize("case", [(1, 1, 1), (-1, 0, 5), (0, 0, 0)])
def test_impossible_counts(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="impossible counts"):
        paired_interval(*case)


@pytest.mark.realdata
@pytest.mark.skipif("DEPLOYKIT_REAL_DATA" not in os.environ, reason="DEPLOYKIT_REAL_DATA is unset")
def test_a_real_classifier_scores_as_known() -> None:
    root = Path(os.environ["DEPLOYKIT_REAL_DATA"])
    weights = root / "weights" / "dinov2_s_imagenette_168.safetensors"
    section = ModelSection(name="vit_small_patch14_dinov2", weights=str(weights), img_size=168)
    backbone, _ = build_backbone(section, seed=0)
    assert backbone.num_classes == 10 and backbone.weights.kind == "file"
    images = open_dataset(
        root / "imagenette" / "val", backbone.preprocessing, labelled=True, num_classes=10, limit=60
    )
    predictions = top1_and_predictions(backbone.module, images, 20)
    assert images.labels is not None
    assert float((predictions == images.labels).float().mean()) > 0.7
