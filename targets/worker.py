"""The measuring process: ``python -m deploykit.targets.worker``, started by ``measure``.

It reads one request (JSON) from standard input and writes events (one JSON object a line) to
standard output: ``progress``, then ``result`` or ``error``. It must stay small: no torch, whose
threads and memory would be measured too, hence neither ``deploykit.types`` nor pydantic.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from deploykit.errors import TargetMissingError, UsageError, one_line
from deploykit.targets.answering import Emit, answer_request, end_with
from deploykit.targets.device import Neighbours, describe, peak_rss_bytes, pin
from deploykit.targets.energy import Meter, NvmlMeter, energy_of_a_call, find_rapl
from deploykit.targets.machine_state import read_state, throttled_between
from deploykit.targets.nvml import Gpu, find_gpu
from deploykit.targets.registry import FloatArray, Outputs, Runner, Target, get_target, joined

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


def main() -> int:
    """Answer the request on standard input; exit code 0 when an answer was sent."""
    return answer_request(_answer)


def _answer(request: Request, emit: Emit) -> dict[str, Any]:
    return _memory(request) if request["mode"] == "memory" else _time(request, emit)


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
    before = time.perf_counter_ns()
    runner(images)
    first_call_ms = (time.perf_counter_ns() - before) / 1e6
    for _ in range(_MEMORY_RUNS - 1):
        runner(images)
    peak = peak_rss_bytes()  # before anything else is loaded
    on_device = getattr(target, "device_memory_bytes", None)
    kernels = target.kernels(Path(path))
    return {
        "peak_rss_bytes": peak,
        "device_memory_bytes": None if on_device is None else on_device(),
        "load_ms": load_ms,
        "first_call_ms": first_call_ms,
        "kernels": kernels,
        "ran_as": ran_as(kernels, _floats(target, runner)),
        **_energy(target, lambda: runner(images)),
    }


def _floats(target: Target, runner: Runner) -> str:
    """What a loaded file says it computes floats in; else what its target says."""
    other = getattr(target, "floats", "not told by the target")  # another package's may be older
    return str(getattr(runner, "precision", other))


def ran_as(kernels: Mapping[str, int], floats: str) -> str:
    """The precision that really ran: ``int8 in 40 of 43 kernels, float32``."""
    integer: Counter[str] = Counter()
    for name, count in kernels.items():
        width = name.split()[0]
        if width.startswith("int"):
            integer[width] += count
    total = sum(count for name, count in kernels.items() if not name.startswith("simulated"))
    parts = [f"{width} in {count} of {total} kernels" for width, count in sorted(integer.items())]
    return ", ".join([*parts, floats])


def _energy(target: Target, call: Callable[[], object]) -> dict[str, Any]:
    meter: Meter | None
    gpu, reason = _gpu(target)
    if _on_gpu(target):
        try:
            meter = None if gpu is None else NvmlMeter(gpu)
        except Exception as error:  # older than Volta; the library is not ours
            meter, reason = None, f"the GPU doesn't count its energy ({one_line(error)})"
    else:
        meter, reason = find_rapl()
    if meter is None:
        return {"energy_mj": None, "energy": reason}
    return {"energy_mj": energy_of_a_call(call, meter), "energy": meter.source}


def _on_gpu(target: Target) -> bool:
    return target.name.startswith("cuda")


def _gpu(target: Target) -> tuple[Gpu | None, str]:
    return find_gpu() if _on_gpu(target) else (None, "")


def _time(request: Request, emit: Emit) -> dict[str, Any]:
    from deploykit.targets.protocol import Timing, discredit, run_protocol

    pinned = pin(request["cores"])
    target = _usable(request)
    emit({"event": "progress", "fraction": 0.0, "text": "loading"})
    calls = _calls(target, request)
    gpu, no_gpu = _gpu(target)
    facts = describe(
        request["target"],
        target.runtime(),
        threads=request["threads"],
        cores=request["cores_available"],
        pinned_to=pinned,
        gpu=gpu,
    )
    timing = Timing(
        min_samples=request["min_samples"],
        min_seconds=request["min_seconds"],
        max_seconds=request["max_seconds"],
        warmup_seconds=request["warmup_seconds"],
        seed=request["seed"],
    )
    neighbours = Neighbours(pinned)
    state = read_state(pinned, gpu)
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
    later = read_state(pinned, gpu)
    if (slowed := throttled_between(state, later)) is not None:
        series = [discredit(one, slowed) for one in series]
    for one in (state, later):
        one["missing"] += [no_gpu] if no_gpu else []
    device = {**facts, "before": state, "after": later}

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
        "ratio_noisy": one.ratio_noisy,
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


def _calls(target: Target, request: Request) -> Sequence[Callable[[], Outputs]]:
    images = _images(request)
    calls = []
    for path in request["artifacts"]:
        runner = target.load(Path(path), request["threads"])
        output = joined(runner(images))
        if output.ndim < 2 or len(output) != len(images):
            message = f"{path}: {len(images)} images in, output of shape {output.shape} out"
            raise UsageError(message)
        calls.append(lambda runner=runner: runner(images))
    return calls


if __name__ == "__main__":
    end_with(main)
