"""GPUSQ-ViT: sparse first, then rounded, both taught by the same original.

Yu et al., "Boost vision transformer with GPU-friendly sparsity and quantization" (CVPR 2023):
2:4 weights are recovered by distillation; then quantisation-aware training goes on from there,
and a block's share of the feature loss is what was left of its loss in the sparse stage. (Written
from the published description; the authors' code is not public.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deploykit.graph.capture import CapturedModel
from deploykit.progress import Steps, silent
from deploykit.prune.recover import recover
from deploykit.prune.recover_data import Images
from deploykit.prune.recover_options import QatOptions, RecoverOptions
from deploykit.types import PassRecord

__all__ = ["recover_gpusq", "weights_from"]


def recover_gpusq(
    student: CapturedModel,
    teacher: CapturedModel,
    options: RecoverOptions,
    images: Images,
    *,
    steps: Steps = silent,
    checkpoint: Path | None = None,
) -> tuple[CapturedModel, tuple[PassRecord, PassRecord]]:
    """Both stages, each with the options' epochs, time and checkpoints.

    Args:
        student: with 2:4 zeros, which both stages keep.
        options: its ``qat`` is the second stage's; w8a8 if it has none.

    Returns:
        Float weights on the trained grid for the ordinary quantiser, 2:4 as they came; a record
        for each stage.

    Raises:
        As ``recover``.
    """
    qat = options.qat or QatOptions()
    stages = [None if checkpoint is None else checkpoint / name for name in ("sparse", "rounded")]
    first = replace(options, qat=None, keep_zeros=True)
    sparse, sparse_record = recover(
        student, teacher, first, images, steps=steps, checkpoint=stages[0]
    )
    second = replace(first, qat=qat, feature_weights=weights_from(sparse_record))
    rounded, rounded_record = recover(
        sparse, teacher, second, images, steps=steps, checkpoint=stages[1]
    )
    return rounded, (sparse_record, rounded_record)


def weights_from(record: PassRecord) -> tuple[tuple[str, float], ...]:
    """Factors of the feature loss by block, with a mean of 1: each block's own loss at the end.

    Empty where no block was compared, or none had anything left to learn.
    """
    history = record.details["history"]
    left = {
        key.removeprefix("features|"): float(value)
        for key, value in (history[-1]["parts"] if history else {}).items()
        if key.startswith("features|")
    }
    total = sum(left.values())
    if not total > 0:
        return ()
    return tuple((block, value * len(left) / total) for block, value in left.items())
