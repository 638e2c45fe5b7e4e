"""Recovery by distillation: a damaged graph learns to answer as the original does.

The student is any captured graph that came from the teacher's model: pruned, merged, sparse. Its
weights are trained, its structure is not: what goes in can be exported, and so can what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from deploykit.errors import TargetMissingError, UsageError, one_line
from deploykit.graph.capture import CapturedModel
from deploykit.progress import Steps, silent
from deploykit.prune.distill_losses import LOSSES
from deploykit.prune.distill_taps import comparable, with_taps
from deploykit.prune.qat import PREFIX, insert_fake_quantizers, rounded_weights
from deploykit.prune.recover_checkpoint import fingerprint
from deploykit.prune.recover_data import Images, split
from deploykit.prune.recover_judge import Judge
from deploykit.prune.recover_loop import Training
from deploykit.prune.recover_options import QatOptions, RecoverOptions
from deploykit.prune.recover_weights import hold_zeros, make_trainable, named, write_back
from deploykit.types import PassRecord

__all__ = ["QatOptions", "RecoverOptions", "Steps", "import_accelerate", "recover"]


def import_accelerate() -> Any:
    """accelerate's ``Accelerator``.

    Raises:
        TargetMissingError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        cure = "pip install 'deploykit-vision[recover]'"
        message = f"recovery needs accelerate ({one_line(error)}); {cure}"
        raise TargetMissingError(message) from error
    return Accelerator


def recover(
    student: CapturedModel,
    teacher: CapturedModel,
    options: RecoverOptions,
    images: Images,
    *,
    steps: Steps = silent,
    checkpoint: Path | None = None,
) -> tuple[CapturedModel, PassRecord]:
    """Distil the teacher into the student, for a short while, and keep the best of it.

    The best averaged weights by the held-out images are returned; those the student came with if
    none were better. BatchNorm stays in inference form: its weight and bias are trained, its
    statistics stay. Images come with their augmentation; held-out ones without it where the data
    set has ``evaluation()``.

    Memory: about eight times the weights (student, teacher, gradients, AdamW's two moments, the
    average, the best), and the activations of one batch.

    On several GPUs start the program with ``torchrun`` or ``accelerate launch``.

    Args:
        student, teacher: left unchanged.
        images: items (float32 (3, S, S), label), -1 for no label, and a length.
        steps: shows progress.
        checkpoint: a folder; a run that was interrupted goes on from it with the same result.

    Returns:
        The recovered graph, of the student's structure, in float (after quantisation-aware
        training its weights lie on the grid they were trained on); and what was done.

    Raises:
        UsageError: no images, other classes, a graph with a fixed batch, nothing to compare, a
            checkpoint of another run.
        TargetMissingError: accelerate is not installed.
        DeploykitError: the loss is no longer a number.
    """
    accelerator_class = import_accelerate()
    _check_models(student, teacher)
    data = split(images, student.backbone, options)
    parts, left_out = _parts(student, teacher, options)

    accelerator = accelerator_class()
    keys = [(loss, place) for loss, places in parts.items() for place in places]
    training = _tapped(student.graph_module, keys, accelerator.device)
    tapped_teacher = _tapped(teacher.graph_module, keys, accelerator.device)
    names = make_trainable(training)
    zeros = hold_zeros(training) if options.keep_zeros else {}
    rounded: dict[str, list[str]] = {}
    if (qat := options.qat) is not None:
        rounded = insert_fake_quantizers(
            training, qat, lambda: data.calibration(qat.calibration_batches)
        )
    ranges = [(n, p) for n, p in training.named_parameters() if n.startswith(PREFIX)]
    learnt = [name for name, parameter in ranges if parameter.requires_grad]

    for parameter in tapped_teacher.parameters():
        parameter.requires_grad_(False)
    tapped_teacher.to(accelerator.device)
    judge = Judge(
        accelerator,
        tapped_teacher,
        data.judged(accelerator.process_index, accelerator.num_processes),
        next(f"{loss}|{place}" for loss, place in keys if place == "logits"),
        options.precision,
    )
    work = Training(
        accelerator, training, tapped_teacher, parts, options,
        names=[*names, *learnt], data=data, judge=judge, checkpoint=checkpoint,
        run_id=_run_id(options, data.count, accelerator.num_processes, student, teacher),
    )  # fmt: skip
    try:
        best = work.run(steps)
    except UsageError as error:  # of a reading process: its last line is the message
        text = str(error).strip().splitlines()[-1]
        raise UsageError(text.removeprefix(f"{UsageError.__module__}.UsageError: ")) from error
    accelerator.free_memory()

    write_back(training, best)
    recovered = student.copy()
    write_back(recovered.graph_module, {**named(training, names), **rounded_weights(training)})
    record = _record(work, options, left_out, zeros, rounded, len(data.held_out))
    return recovered, record


def _check_models(student: CapturedModel, teacher: CapturedModel) -> None:
    mine, theirs = student.backbone.num_classes, teacher.backbone.num_classes
    if mine != theirs:
        raise UsageError(f"recover: the student has {mine} classes, the teacher {theirs}")
    sizes = [model.backbone.preprocessing.size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UsageError(f"recover: the student takes {sizes[0]} pixels, the teacher {sizes[1]}")
    if not (student.dynamic_batch and teacher.dynamic_batch):
        raise UsageError("recover: the model fixes its batch at one image; it can't be trained so")


def _parts(
    student: CapturedModel, teacher: CapturedModel, options: RecoverOptions
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, str]]]:
    """Weight of each part of the loss, and what is left out. ``logits`` is always among them."""
    factors = dict(options.feature_weights)
    wanted = {"logits": 0.0, **{name: weight for name, weight in options.losses if weight > 0}}
    parts: dict[str, dict[str, float]] = {}
    left_out: dict[str, dict[str, str]] = {}
    for name, weight in wanted.items():
        find = LOSSES[name].find
        kept, missing = comparable(
            student.graph_module, teacher.graph_module, find, student.example
        )
        if name == "logits" and not kept:
            raise UsageError(f"recover: other classes: {missing['logits']}")
        if missing:
            left_out[name] = missing
        share = {place: factors.get(place, 1.0) if name == "features" else 1.0 for place in kept}
        if kept:
            parts[name] = {place: weight * share[place] / len(kept) for place in kept}
    strange = [name for name in factors if name not in parts.get("features", {})]
    if strange:
        raise UsageError(f"recover.feature_weights: no block {strange[0]} that can be compared")
    if not any(weight > 0 for places in parts.values() for weight in places.values()):
        losses = ", ".join(name for name, _ in options.losses)
        raise UsageError(
            f"recover: nothing in the student can be compared with {losses}; add logits"
        )
    return parts, left_out


def _tapped(
    graph_module: fx.GraphModule, keys: list[tuple[str, str]], device: torch.device
) -> fx.GraphModule:
    """A training copy that returns every part's value; constants are made on the device."""
    found = {loss: LOSSES[loss].find(graph_module.graph) for loss, _ in keys}
    tapped = with_taps(
        graph_module, {f"{loss}|{place}": found[loss][place] for loss, place in keys}
    )
    for node in tapped.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    tapped.recompile()
    return tapped


def _run_id(options: RecoverOptions, count: int, processes: int, *models: CapturedModel) -> str:
    settings: Mapping[str, Any] = {
        "options": asdict(replace(options, workers=0)), "images": count, "processes": processes,
        "graphs": [str(model.graph_module.graph) for model in models],
    }  # fmt: skip
    return fingerprint(settings, *(model.graph_module for model in models))


def _record(
    work: Training,
    options: RecoverOptions,
    left_out: dict[str, dict[str, str]],
    zeros: dict[str, float],
    rounded: dict[str, list[str]],
    held_out: int,
) -> PassRecord:
    state, best = work.state, work.stop.best
    assert best is not None
    seen = state.step * options.batch_size * work.accelerator.num_processes
    at = f" rounded to {options.qat.bits}" if options.qat is not None else ""
    drop = f"{state.before['drop']:.1f} → {best.drop:.1f} points ({best.by})"
    summary = f"{state.step} steps of distillation{at}: drop on {held_out} held-out images {drop}"
    details = {
        "held_out": (
            f"{held_out} images split from the training images; not the images that accuracy "
            "is measured on"
        ),
        "before": state.before,
        "best": asdict(best),
        "stopped": work.stop.reason or "all steps done",
        "steps": state.step,
        "images_seen": seen,
        "seconds": round(state.seconds, 1),
        "images_per_second": round(seen / max(state.seconds, 1e-9), 2),
        "processes": work.accelerator.num_processes,
        "precision": options.precision,
        "batch_norm": "in inference form: statistics fixed, weight and bias trained",
        "losses": {loss: dict(places) for loss, places in work.parts.items()},
        "left_out": left_out,
        "zeros_kept": {name: round(share, 4) for name, share in zeros.items()},
        "rounded": rounded,
        "history": state.history,
    }
    return PassRecord(name="recover", summary=summary, details=details)
