"""The measuring process: ``python -m deploykit.targets.worker``, started by ``measure``.

It reads one request (JSON) from standard input and writes events (one JSON object a line) to
standard output: ``progress``, then ``result`` or ``error``. It must stay small: no torch, whose
threads and memory would be measured too, hence neither ``deploykit.types`` nor pydantic.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypedDict

import numpy as np

from deploykit.errors import (
    DeploykitError,
    TargetMissingError,
    UsageError,
)
from deploykit.targets.device import Neighbours, describe, peak_rss_bytes, pin
from deploykit.targets.process_end import end_with
from deploykit.targets.registry import FloatArray, Target, get_target

if TYPE_CHECKING:
    from deploykit.targets.protocol import Series

__all__ = ["Request", "main", "plain_series"]

_MEMORY_RUNS = 3  # the first allocates; later ones may grow the arena once more

_BUSY_SHARE = 0.1


class Request(TypedDict):
    """What ``measure`` asks for. Times are seconds, ``cores`` the logical cores to pin to."""

    mode: str  # "time" or "memory"
    target: str
    artifacts: list[str]
    batch: int
    input_shape: list[int]
    threads: int
    cores: list[int]
    cores_available: int
    min_samples: int
    min_seconds: float
    max_seconds: float
    warmup_seconds: float
    seed: int


Emit = Callable[[dict[str, Any]], None]


def main() -> int:
    """Answer the request on standard input; exit code 0 when an answer was sent."""
    events = _private_stdout()

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        request: Request = json.loads(sys.stdin.buffer.read())
        answer = _memory(request) if request["mode"] == "memory" else _time(request, emit)
        emit({"event": "result", **answer})
    except DeploykitError as error:
        emit({"event": "error", "kind": type(error).__name__, "message": str(error)})
    except MemoryError:
        emit({"event": "error", "kind": "MeasurementError", "message": "out of memory"})
    return 0


def _private_stdout() -> TextIO:
    """Keep standard output for events: native libraries print there, now to standard error."""
    events = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    return events


def _usable(request: Request) -> Target:
    target = get_target(request["target"])
    reason = target.available()  # imports the runtime, so that loading is timed without it
    if reason is not None:
        raise TargetMissingError(reason)
    return target


def _images(request: Request) -> FloatArray:
    rng = np.random.default_rng(request["seed"])
    shape = (request["batch"], *request["input_shape"])
    return rng.standard_normal(shape, dtype=np.float32)


def _memory(request: Request) -> dict[str, Any]:
    """Load one artefact in this otherwise empty process, run it, and read the peak."""
    pin(request["cores"])
    target = _usable(request)
    (path,) = request["artifacts"]
    before = time.perf_counter_ns()
    runner = target.load(Path(path), request["threads"])
    load_ms = (time.perf_counter_ns() - before) / 1e6
    images = _images(request)
    for _ in range(_MEMORY_RUNS):
        runner(images)
    peak = peak_rss_bytes()  # before anything else is loaded
    return {"peak_rss_bytes": peak, "load_ms": load_ms, "kernels": target.kernels(Path(path))}


def _time(request: Request, emit: Emit) -> dict[str, Any]:
    from deploykit.targets.protocol import Timing, discredit, run_protocol

    pinned = pin(request["cores"])
    target = _usable(request)
    emit({"event": "progress", "fraction": 0.0, "text": "loading"})
    calls = _calls(target, request)
    device = describe(
        request["target"],
        target.runtime(),
        threads=request["threads"],
        cores=request["cores_available"],
        pinned_to=pinned,
    )
    timing = Timing(
        min_samples=request["min_samples"],
        min_seconds=request["min_seconds"],
        max_seconds=request["max_seconds"],
        warmup_seconds=request["warmup_seconds"],
        seed=request["seed"],
    )
    neighbours = Neighbours(pinned)
    series = run_protocol(
        calls,
        timing,
        progress=lambda fraction, text: emit(
            {"event": "progress", "fraction": fraction, "text": text}
        ),
    )

    # A busy neighbour leaves the median of one thread alone (checked: equal models stayed within
    # 1 %), but where several threads must run at once the scheduler parks one behind it, always
    # the same one for a given model: equal models then differ by 2.6 times, in every block alike,
    # which no interval over blocks can see.
    share = neighbours.share()
    if request["threads"] > 1 and share > _BUSY_SHARE:
        reason = f"other processes took {share:.0%} of the cores, too much for several threads"
        series = [discredit(one, reason) for one in series]

    return {"device": device, "measurements": [plain_series(one) for one in series]}


def plain_series(one: Series) -> dict[str, Any]:
    """What was measured of one artefact, as JSON values."""
    ratio = one.ratio
    return {
        "samples": int(one.samples.size),
        "p50_ms": one.p50.value,
        "p50_low_ms": one.p50.low,
        "p50_high_ms": one.p50.high,
        "p90_ms": one.p90,
        "p99_ms": one.p99,
        "withheld": one.withheld,
        "noisy": one.noisy,
        "ratio": ratio and ratio.value,
        "ratio_low": ratio and ratio.low,
        "ratio_high": ratio and ratio.high,
        "samples_ms": [round(sample, 6) for sample in one.samples.ravel().tolist()],
        "warmup": {
            "calls": one.warmup.calls,
            "seconds": one.warmup.seconds,
            "stable": one.warmup.stable,
        },
    }


def _calls(target: Target, request: Request) -> Sequence[Callable[[], FloatArray]]:
    images = _images(request)
    calls = []
    for path in request["artifacts"]:
        runner = target.load(Path(path), request["threads"])
        output = runner(images)
        if output.ndim < 2 or len(output) != len(images):
            message = f"{path}: {len(images)} images in, output of shape {output.shape} out"
            raise UsageError(message)
        calls.append(lambda runner=runner: runner(images))
    return calls


if __name__ == "__main__":
    end_with(main)
