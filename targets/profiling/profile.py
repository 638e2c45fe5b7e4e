"""Ask a measuring process for the profiles of files, side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.targets.child import ask
from deploykit.targets.device import allowed_cores, pick_cores
from deploykit.targets.profiling.kernels import get_reader
from deploykit.targets.profiling.worker import COMMAND
from deploykit.targets.registry import get_target

__all__ = ["ROUNDS", "FileProfile", "KernelTime", "profile_files"]

ROUNDS = 6
"""With six, the least and the largest of a time hold its median with 97 % (1 - 2 / 2**6)."""

_SILENCE_SECONDS = 600.0


@dataclass(frozen=True)
class KernelTime:
    """One kernel of a file and how long it took.

    Attributes:
        layer: the layer it belongs to, "" where that can't be told.
        node: the file's own operator of that layer (a layer may run twice).
        kind: see ``kernels.Kind``.
        ms: of one call, in each round; scaled to unprofiled calls.
    """

    layer: str
    node: str
    name: str
    op: str
    kind: str
    precision: str
    ms: tuple[float, ...]


@dataclass(frozen=True)
class FileProfile:
    """A file's kernels in the order they run. In each round their times add up to ``total_ms``."""

    path: Path
    total_ms: tuple[float, ...]
    kernels: tuple[KernelTime, ...]


def profile_files(
    target: str,
    paths: Sequence[str | os.PathLike[str]],
    *,
    input_shape: tuple[int, int, int],
    batch: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
) -> list[FileProfile]:
    """Profile files on a target, in turns, in one process of its own.

    Args:
        input_shape: (channels, height, width) of the random images they are run on.
        seconds: spent on unprofiled calls of each file, and about as much on profiled ones.

    Raises:
        UsageError: a file is missing, refused or not of the target's formats; a parameter is out
            of range.
        TargetMissingError: the target isn't there, or no profiler of it can be read.
        MeasurementError: the measuring process failed, or the profile makes no sense.
    """
    chosen = get_target(target)
    get_reader(target)
    files = [Path(path) for path in paths]
    for path in files:
        if not path.exists():
            raise UsageError(f"{path}: no such file")
        if path.suffix.lstrip(".") not in chosen.formats:
            formats = ", ".join(f".{one}" for one in chosen.formats)
            raise UsageError(f"{path}: {target} loads {formats} files")
    if min(batch, threads, rounds, *input_shape) < 1 or not files:
        raise UsageError("wanted files, and batch, threads, rounds and input_shape of 1 or more")
    if threads > len(allowed_cores()):
        cores = len(allowed_cores())
        message = f"{threads} threads wanted, but this process may run on {cores} cores"
        raise UsageError(message)
    if (reason := chosen.available()) is not None:
        raise TargetMissingError(reason)
    request = {
        "target": target,
        "files": [str(path.absolute()) for path in files],
        "input_shape": list(input_shape),
        "batch": batch,
        "threads": threads,
        "cores": pick_cores(threads),
        "seconds": seconds,
        "rounds": rounds,
        "seed": seed,
    }
    answer = ask(request, progress=progress, silence_seconds=_SILENCE_SECONDS, command=COMMAND)
    try:
        return [
            FileProfile(
                path,
                tuple(float(ms) for ms in found["total_ms"]),
                tuple(
                    KernelTime(**{**kernel, "ms": tuple(float(ms) for ms in kernel["ms"])})
                    for kernel in found["kernels"]
                ),
            )
            for path, found in zip(files, answer["files"], strict=True)
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        message = f"the measuring process sent an answer that cannot be read ({error!r:.200})"
        raise MeasurementError(" ".join(message.split())) from error
