"""Several recoveries of one student, and their average: the price is training time alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from deploykit.errors import UsageError
from deploykit.graph.capture import CapturedModel
from deploykit.progress import Steps, silent
from deploykit.prune.distill_taps import logits, with_taps
from deploykit.prune.recover import import_accelerate, recover
from deploykit.prune.recover_data import Images, split
from deploykit.prune.recover_judge import Judge
from deploykit.prune.recover_options import RecoverOptions
from deploykit.prune.soup import soup
from deploykit.types import PassRecord

__all__ = ["held_out_score", "recover_soup"]


def recover_soup(
    student: CapturedModel,
    teacher: CapturedModel,
    variants: Sequence[RecoverOptions],
    images: Images,
    *,
    mode: Literal["uniform", "greedy"] = "greedy",
    steps: Steps = silent,
    checkpoint: Path | None = None,
) -> tuple[CapturedModel, tuple[PassRecord, ...]]:
    """Recover the student once for each variant and average what comes out.

    Args:
        variants: they may differ in seed, rate, losses, length; all hold out the same images, on
            which the soup is scored, and none is quantisation-aware.
        checkpoint: a folder; each recovery has its own in it.

    Returns:
        The average; a record of each recovery and one of the soup.

    Raises:
        UsageError: no variants, or variants that can't be averaged; else as ``recover``.
    """
    if not variants:
        raise UsageError("soup: no recoveries to average")
    if any(options.qat is not None for options in variants):
        raise UsageError("soup: quantisation-aware recoveries can't be averaged; drop recover.qat")
    kept_out = {(o.held_out, o.held_out_images, o.split_seed) for o in variants}
    if len(kept_out) > 1:
        raise UsageError("soup: the recoveries must hold out the same images")
    models, records = [], []
    for number, options in enumerate(variants):
        folder = None if checkpoint is None else checkpoint / f"recovery-{number}"
        model, record = recover(student, teacher, options, images, steps=steps, checkpoint=folder)
        models.append(model)
        records.append(record)
    score = held_out_score(teacher, images, variants[0]) if mode == "greedy" else None
    mixed, made = soup(models, mode, score)
    return mixed, (*records, made)


def held_out_score(
    teacher: CapturedModel, images: Images, options: RecoverOptions
) -> Callable[[CapturedModel], float]:
    """How near a model is to the teacher: minus their divergence on the held-out images, nats.

    Finer than a count of right answers on so few images.
    """
    accelerator = import_accelerate()()
    data = split(images, teacher.backbone, options)

    def answering(model: CapturedModel) -> nn.Module:
        taps = logits(model.graph_module.graph)
        return with_taps(model.graph_module, taps).to(accelerator.device)

    judge = Judge(
        accelerator,
        answering(teacher),
        data.judged(accelerator.process_index, accelerator.num_processes),
        "logits",
        options.precision,
    )
    return lambda model: -judge(answering(model)).kl
