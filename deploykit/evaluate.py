"""Accuracy of an artefact beside the original's, on the same images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from deploykit.data import ImageSet
from deploykit.types import Accuracy

__all__ = ["paired_accuracy", "paired_interval", "top1_and_predictions"]


def top1_and_predictions(
    run: Callable[[Tensor], Tensor],
    images: ImageSet,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Top-1 predictions of ``run`` for every image, int64 (N,).

    ``run`` takes float32 (n, 3, S, S) and returns scores (n, classes). ``progress`` is told the
    number of images done after each batch. A row with a score that is NaN or infinite predicts
    -1, which is never right: argmax would pick a class from it without a word.

    Raises:
        UsageError: an image can't be read.
    """
    predictions = []
    done = 0
    with torch.no_grad():
        for batch, _ in images.tensor_batches(batch_size):
            scores = run(batch)
            if scores.ndim != 2 or scores.shape[0] != batch.shape[0]:
                message = f"wanted scores ({batch.shape[0]}, classes), got {tuple(scores.shape)}"
                raise ValueError(message)
            best = scores.argmax(dim=1)
            predictions.append(best.masked_fill(~scores.isfinite().all(dim=1), -1))
            done += batch.shape[0]
            if progress is not None:
                progress(done)
    return torch.cat(predictions).to(torch.int64)


def paired_accuracy(
    artifact_name: str, labels: Tensor, original_pred: Tensor, pred: Tensor, data: str
) -> Accuracy:
    """Accuracy of an artefact and of the original it came from; all tensors int64 (N,).

    Why paired: both models saw the same images, and most images are easy or hopeless for both.
    Only those that one gets right and the other wrong tell the models apart. Comparing two
    percentages as if they came from different images throws that away: on 1,000 images it can't
    see a drop under about 3 points, while a pair of counts such as 9 lost, 2 gained can.
    """
    count = int(labels.numel())
    if count == 0 or original_pred.shape != labels.shape or pred.shape != labels.shape:
        message = (
            f"wanted three tensors of one length above 0, got {tuple(labels.shape)}, "
            f"{tuple(original_pred.shape)}, {tuple(pred.shape)}"
        )
        raise ValueError(message)
    was_right, is_right = original_pred == labels, pred == labels
    lost = int((was_right & ~is_right).sum())
    gained = int((~was_right & is_right).sum())
    low, high = paired_interval(lost, gained, count)
    return Accuracy(
        artifact=artifact_name,
        data=data,
        images=count,
        top1_original=100.0 * int(was_right.sum()) / count,
        top1=100.0 * int(is_right.sum()) / count,
        lost=lost,
        gained=gained,
        drop=100.0 * (lost - gained) / count,
        drop_low=100.0 * low,
        drop_high=100.0 * high,
    )


def paired_interval(
    lost: int, gained: int, count: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Score interval of the difference of two paired proportions, ``(lost - gained) / count``.

    Tango's method (T. Tango, "Equivalence test and confidence interval for the difference in
    proportions for the paired-sample design", Statistics in Medicine 17, 1998, 891-908): the
    differences that a score test wouldn't reject. It excludes 0 exactly where McNemar's test
    rejects, keeps its coverage in small samples, and has a width even where no image changed
    sides, where the usual interval shrinks to a point.

    Returns fractions in [-1, 1].
    """
    if count < 1 or min(lost, gained) < 0 or lost + gained > count:
        raise ValueError(f"impossible counts: {lost} lost and {gained} gained of {count}")
    z = float(norm.ppf(0.5 + confidence / 2))
    difference = (lost - gained) / count

    def excess(delta: float) -> float:
        """The score statistic's square root, signed, for a true difference ``delta``."""
        # the most likely share of gained images, were the difference delta
        a = 2.0 * count
        b = -lost - gained + (2.0 * count - lost + gained) * delta
        c = -gained * delta * (1.0 - delta)
        share = ((max(b * b - 4.0 * a * c, 0.0)) ** 0.5 - b) / (2.0 * a)
        variance = count * (2.0 * share + delta * (1.0 - delta))
        gap = lost - gained - count * delta
        return float(gap) / max(variance, 1e-300) ** 0.5 if gap else 0.0

    edge = 1.0 - 1e-12  # at ±1 itself the variance is 0
    low, high = -1.0, 1.0
    if difference > -edge and excess(-edge) > z:
        low = float(brentq(lambda d: excess(d) - z, -edge, difference, xtol=1e-12))
    if difference < edge and excess(edge) < -z:
        high = float(brentq(lambda d: excess(d) + z, difference, edge, xtol=1e-12))
    return low, high
