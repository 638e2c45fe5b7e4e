"""What recovery can be asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deploykit.errors import UsageError
from deploykit.prune.distill_losses import LOSSES

__all__ = ["QatOptions", "RecoverOptions", "rate_for"]


@dataclass(frozen=True)
class QatOptions:
    """Quantisation-aware training: what weights and layer inputs are rounded to meanwhile.

    Attributes:
        weight_bits, input_bits: 2 to 8; 16 leaves that side in float.
        edge_bits: at least so many for the first and the last layer.
        ranges: ``learnt`` with the weights (LSQ, in log scale) or ``fixed`` as calibrated.
        calibration_batches: training batches that the ranges of the inputs are fitted on.
    """

    weight_bits: int = 8
    input_bits: int = 8
    edge_bits: int = 8
    ranges: Literal["learnt", "fixed"] = "learnt"
    calibration_batches: int = 4

    def __post_init__(self) -> None:
        for name in ("weight_bits", "input_bits", "edge_bits"):
            bits = getattr(self, name)
            if bits != 16 and not 2 <= bits <= 8:
                raise UsageError(f"recover.qat.{name}: wanted 2 to 8, or 16 for float, got {bits}")
        if self.weight_bits == 16 and self.input_bits == 16:
            raise UsageError("recover.qat: 16-bit weights and inputs leave nothing to quantise")
        if self.calibration_batches < 1:
            raise UsageError("recover.qat.calibration_batches: wanted 1 or more")

    @property
    def bits(self) -> str:
        return f"w{self.weight_bits}a{self.input_bits}"


def rate_for(kl: float) -> float:
    """AdamW's rate for a student whose divergence from its teacher is ``kl`` nats.

    ``2e-5 sqrt(kl)``, within 3e-6 and 1e-4. AdamW moves each weight by about the rate whatever the
    gradient's size, so a student that is nearly right is made worse by what a damaged one needs: a
    ViT with a quarter of its tokens merged three times (0.06 nats) got worse in its first 40 steps
    at 2e-5 and better at 5e-6; with 30 % of its widths gone (above 1 nat) 2e-5 won back nearly all.
    """
    return min(max(2e-5 * math.sqrt(max(kl, 0.0)), 3e-6), 1e-4)


@dataclass(frozen=True)
class RecoverOptions:
    """Distillation of a student graph from its original; the recipe's ``recover`` section.

    Attributes:
        losses: (registered loss, weight); ``labels`` counts only where images have labels.
        temperature: of the ``logits`` loss.
        feature_weights: (block, factor) for the parts of ``features``; 1 where not named.
        lr: AdamW's highest rate, after ``warmup`` (share of all steps), before a cosine to 0;
            None takes ``rate_for`` the student's distance from its teacher.
        batch_size: images a step on each process.
        epochs: over the training images; may be a fraction.
        max_seconds: the number of steps is cut to what fits in this time.
        ema_decay: of the averaged weights, which are what is judged and returned.
        clip: the gradient's largest norm.
        held_out: share of the images that are never trained on, and at most
            ``held_out_images``; they choose the best weights and end the training.
        evaluations: how often the student is judged, and a checkpoint written, in all.
        patience: evaluations without a better one before training ends.
        target_drop: training ends when the held-out drop is at most this, percentage points.
        keep_zeros: weights of layers that are 0 stay 0 (2:4 and other masks).
        qat: quantisation-aware training, or None.
        workers: processes that read images; 0 reads them in this one.
        precision: ``bf16`` trains under autocast (GPUs, and CPUs that multiply it).
        seed: of the order and the augmentation; ``split_seed`` chooses the held-out images.
    """

    losses: tuple[tuple[str, float], ...] = (("logits", 1.0), ("embedding", 1.0), ("features", 1.0))
    temperature: float = 2.0
    feature_weights: tuple[tuple[str, float], ...] = ()
    lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    batch_size: int = 32
    epochs: float = 1.0
    max_seconds: float | None = None
    ema_decay: float = 0.99
    clip: float = 1.0
    held_out: float = 0.1
    held_out_images: int = 512
    evaluations: int = 10
    patience: int = 4
    target_drop: float | None = None
    keep_zeros: bool = True
    qat: QatOptions | None = None
    workers: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    split_seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name, _ in self.losses if name not in LOSSES]
        if unknown:
            raise UsageError(f"recover: no loss {unknown[0]!r}; there are {', '.join(LOSSES)}")
        if not any(weight > 0 for _, weight in self.losses):
            raise UsageError("recover.losses: at least one weight above 0 is wanted")
        if any(weight < 0 for _, weight in (*self.losses, *self.feature_weights)):
            raise UsageError("recover: weights of losses can't be negative")
        if self.lr is not None and not self.lr > 0:
            raise UsageError(f"recover.lr: wanted more than 0, got {self.lr}")
        positive = {"batch_size", "epochs", "temperature", "clip", "evaluations", "patience"}
        for name in sorted(positive):
            if not getattr(self, name) > 0:
                raise UsageError(f"recover.{name}: wanted more than 0, got {getattr(self, name)}")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise UsageError(f"recover.max_seconds: wanted more than 0, got {self.max_seconds}")
        if not 0 < self.held_out < 1 or self.held_out_images < 1:
            raise UsageError("recover.held_out: wanted a share between 0 and 1, and an image")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise UsageError("recover: ema_decay and warmup lie in 0..1, weight_decay from 0 up")
        if self.workers < 0:
            raise UsageError(f"recover.workers: wanted 0 or more, got {self.workers}")
