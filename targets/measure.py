"""Latency, memory and load time of artefacts, each taken in a fresh process.

The caller's process has torch, its threads and its memory; none of that belongs in the figures.
One process times all artefacts side by side; then one short process for each artefact reads its
peak memory (of the whole process: interpreter, runtime and model) and its load time (with the
runtime already imported and the file usually in the page cache).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.targets.exclusive import measuring_alone
from deploykit.targets.place import place_of
from deploykit.targets.registry import get_target
from deploykit.types import Measurement

__all__ = ["measure"]

Progress = Callable[[float, str], None]

_TIMING_SHARE = 0.85  # of the progress bar
_SILENCE_SECONDS = 600.0


@measuring_alone()
def measure(
    target: str,
    artifacts: Sequence[tuple[str, str | os.PathLike[str], str]],
    *,
    batch: int = 1,
    input_shape: tuple[int, int, int],
    threads: int = 1,
    min_samples: int = 64,
    min_seconds: float = 3.0,
    max_seconds: float = 30.0,
    warmup_seconds: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
    silence_seconds: float = _SILENCE_SECONDS,
) -> list[Measurement]:
    """Measure ``artifacts`` — (name, file, precision), the original first — on ``target``.

    The process is pinned to as many of its allowed cores as there are threads. Inputs are random
    normal images of ``input_shape`` (channels, height, width), seeded. ``min_seconds`` and
    ``max_seconds`` count the timed phase of all artefacts together, ``warmup_seconds`` is the
    most that is spent warming up each. A measuring process that says nothing for
    ``silence_seconds`` (a single load or call that long) is ended.

    Raises:
        UsageError: a parameter out of range, an unknown target, no or doubled artefacts, a file
            that is missing or refused, more threads than cores.
        TargetMissingError: the target's runtime is not there.
        MeasurementError: the measuring process died, fell silent or gave no usable answer.
    """
    chosen = get_target(target)
    _check_artifacts(artifacts, target, chosen.formats)
    if min(batch, threads, min_samples, *input_shape) < 1:
        raise UsageError("batch, threads, min_samples and input_shape must be 1 or more")
    if not 0 < min_seconds <= max_seconds or warmup_seconds < 0:
        message = (
            "wanted 0 < min_seconds <= max_seconds and warmup_seconds >= 0, got "
            f"{min_seconds:g}, {max_seconds:g} and {warmup_seconds:g}"
        )
        raise UsageError(message)
    place = place_of(chosen)
    reason = chosen.available()
    if reason is not None:
        raise TargetMissingError(reason)
    cores = place.allowed_cores()
    if threads > len(cores):
        message = f"{threads} threads wanted, but this process may run on {len(cores)} cores"
        raise UsageError(message)
    report = progress or _unheard
    request: dict[str, Any] = {
        "mode": "time",
        "target": target,
        "artifacts": [str(Path(path).absolute()) for _, path, _ in artifacts],
        "batch": batch,
        "input_shape": list(input_shape),
        "threads": threads,
        "cores": place.pick_cores(threads),
        "cores_available": len(cores),
        "min_samples": min_samples,
        "min_seconds": min_seconds,
        "max_seconds": max_seconds,
        "warmup_seconds": warmup_seconds,
        "seed": seed,
    }
    timed = place.ask(
        request,
        progress=lambda fraction, text: report(_TIMING_SHARE * fraction, text),
        silence_seconds=silence_seconds,
    )
    memory = []
    for index, (name, _, _) in enumerate(artifacts):
        done = _TIMING_SHARE + (1 - _TIMING_SHARE) * index / len(artifacts)
        report(done, f"peak memory of {name}")
        alone = {**request, "mode": "memory", "artifacts": [request["artifacts"][index]]}
        memory.append(place.ask(alone, silence_seconds=silence_seconds))
    report(1.0, "measured")
    return _assemble(target, artifacts, batch, timed, memory)


def _unheard(_fraction: float, _text: str) -> None:
    """Nobody wants to know."""


def _check_artifacts(
    artifacts: Sequence[tuple[str, str | os.PathLike[str], str]],
    target: str,
    formats: Sequence[str],
) -> None:
    names = [name for name, _, _ in artifacts]
    if not names:
        raise UsageError("nothing to measure: no artefacts were given")
    if len(set(names)) != len(names):
        message = f"artefact names must differ, got {', '.join(names)}"
        raise UsageError(message)
    for _, path, _ in artifacts:
        if not Path(path).exists():
            message = f"{path}: no such file"
            raise UsageError(message)
        if Path(path).suffix.lstrip(".") not in formats:
            message = f"{path}: {target} loads {', '.join(f'.{one}' for one in formats)} files"
            raise UsageError(message)


def _assemble(
    target: str,
    artifacts: Sequence[tuple[str, str | os.PathLike[str], str]],
    batch: int,
    timed: dict[str, Any],
    memory: Sequence[dict[str, Any]],
) -> list[Measurement]:
    known = set(Measurement.model_fields)  # the worker may say more than the report keeps
    try:
        return [
            Measurement.model_validate(
                {
                    **{key: value for key, value in figures.items() if key in known},
                    "artifact": name,
                    "target": target,
                    "precision": precision,
                    "batch": batch,
                    "device": timed["device"],
                    **{key: value for key, value in alone.items() if key in known},
                }
            )
            for (name, _, precision), figures, alone in zip(
                artifacts, timed["measurements"], memory, strict=True
            )
        ]
    except (ValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"the measuring process sent an answer that cannot be read ({error!r:.200})"
        raise MeasurementError(" ".join(message.split())) from error
