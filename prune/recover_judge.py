"""The student beside its teacher on held-out images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from deploykit.prune.recover_stop import Judgement

__all__ = ["Judge", "autocast"]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Torch's autocast; accelerate's own can't be changed within a process."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Judge:
    """Compares a student with what the teacher answered, which is computed once and kept.

    With several processes each judges its share of the images; all get the same result.

    Args:
        accelerator: accelerate's ``Accelerator``.
        loader: held-out images of this process and their labels, -1 where there is none.
        output: the name under which the models return their logits.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(
        self,
        accelerator: Any,
        teacher: nn.Module,
        loader: DataLoader[Any],
        output: str,
        precision: str,
    ) -> None:
        self.accelerator, self.teacher, self.loader = accelerator, teacher, loader
        self.output, self.precision = output, precision
        self.answers: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> Judgement:
        device = self.accelerator.device
        sums = torch.zeros(7, dtype=torch.float64)
        known = bool(self.answers)
        for number, (images, labels) in enumerate(self.loader):
            on_device = images.to(device)
            with autocast(device, self.precision):
                if not known:
                    self.answers.append(self.teacher(on_device)[self.output].float().cpu())
                guess = student(on_device)[self.output].float().cpu()
            sums += _compare(guess, self.answers[number], labels)
        totals: Tensor = self.accelerator.reduce(sums.to(_exact(device)), reduction="sum").cpu()
        images, same, kl, labelled, teacher_right, student_right, nll = totals.tolist()
        agreement = 100 * same / images
        by_labels = labelled == images
        drop = 100 * (teacher_right - student_right) / images if by_labels else 100 - agreement
        found = Judgement(int(images), drop, agreement, kl / images)
        return replace(found, by="labels", nll=nll / images) if by_labels else found


def _compare(guess: Tensor, answer: Tensor, labels: Tensor) -> Tensor:
    """Images, same first class, sum of KL, labelled images, how often either is right, sum of NLL.

    The last is of the student, over the labelled images.
    """
    mine, theirs = guess.argmax(1), answer.argmax(1)
    kl = F.kl_div(
        guess.double().log_softmax(1), answer.double().log_softmax(1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    counts = (mine == theirs, labels >= 0, theirs == labels, mine == labels)
    same, labelled, teacher_right, student_right = (float(c.sum()) for c in counts)
    nll = F.cross_entropy(guess.double(), labels, ignore_index=-1, reduction="sum")
    row = [len(labels), same, float(kl), labelled, teacher_right, student_right, float(nll)]
    return torch.tensor(row, dtype=torch.float64)


def _exact(device: torch.device) -> torch.device:
    """Where float64 exists (Apple's GPUs have none)."""
    return torch.device("cpu") if device.type == "mps" else device
