"""The timing protocol, over plain callables and a clock, so that it can be tested without time.

Each callable is one inference, complete when it returns: numpy array in, numpy array out, both
inside the figure. The first callable is the original.

Warm-up, then blocks. In a block every model runs a burst of calls: one untimed, because the
models before it have taken the caches, then the timed ones. The order of the models is drawn at
random, and the next block runs it backwards, so that drift of the machine hits all alike.
Blocks go on until there are enough samples, enough time has passed and the intervals are narrow,
or the time is used up.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from deploykit.targets.statistics import (
    Interval,
    Samples,
    median_interval,
    paired_ratio,
    percentile,
)

__all__ = [
    "Progress",
    "Series",
    "Timing",
    "Warmup",
    "discredit",
    "run_protocol",
    "time_calls",
    "warm_up",
]

Clock = Callable[[], int]
Progress = Callable[[float, str], None]

_NS = 1e9
_PRECISION = 0.05  # an interval must reach no further than this from its value
_BLOCKS = 16  # fewest blocks an interval is trusted from
_MAX_SAMPLES = 10_000  # per model; more would fill the report and add nothing
_WINDOWS = 5  # windows in a row that must agree for the warm-up to end
_WINDOWS_IN_LIMIT = 20
_AGREEMENT = 0.02
_CHECK_GROWTH = 1.25  # intervals are looked at again when the time has grown by this factor


@dataclass(frozen=True)
class Timing:
    """Parameters. Times are seconds; min and max count the timed phase for all models together."""

    min_samples: int = 64
    min_seconds: float = 3.0
    max_seconds: float = 30.0
    warmup_seconds: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Warmup:
    """How the warm-up of one model went."""

    calls: int
    seconds: float
    last_ms: float
    stable: bool


@dataclass(frozen=True)
class Series:
    """Everything measured of one model, in milliseconds. ``samples`` is (blocks, calls).

    On a machine that changes its speed the median can be uncertain while the ratio is not: what
    slows a whole block cancels in it. So each has its own doubt: ``noisy`` is that of all
    figures together, ``ratio_noisy`` that of the comparison alone.
    """

    samples: Samples
    p50: Interval
    p90: float | None
    p99: float | None
    withheld: str | None
    noisy: bool
    ratio: Interval | None
    ratio_noisy: bool
    warmup: Warmup


def warm_up(call: Callable[[], object], limit: float, clock: Clock) -> Warmup:
    """Call until the medians of five windows in a row agree within 2 %, or ``limit`` seconds.

    A window lasts a twentieth of the limit (one call at least), so that five quick calls that
    happen to agree do not pass for a warm machine.
    """
    medians: list[float] = []
    window: list[int] = []
    calls = 0
    stable = False
    start = window_start = clock()
    while True:
        before = clock()
        call()
        now = clock()
        calls += 1
        window.append(now - before)
        if now - window_start >= limit * _NS / _WINDOWS_IN_LIMIT:
            medians.append(float(np.median(window)))
            window.clear()
            window_start = now
            recent = medians[-_WINDOWS:]
            stable = len(recent) == _WINDOWS and max(recent) <= min(recent) * (1 + _AGREEMENT)
        if stable or now - start >= limit * _NS:
            last = float(np.median(window)) if window else medians[-1]
            return Warmup(calls, (now - start) / _NS, last / 1e6, stable)


def time_calls(call: Callable[[], object], seconds: float, *, least: int, most: int) -> list[float]:
    """Milliseconds of calls one after the other, for ``seconds`` or ``least`` to ``most`` calls.

    One untimed call is made first: what ran before has taken the caches.
    """
    call()
    durations: list[float] = []
    start = time.perf_counter()
    while len(durations) < least or (
        len(durations) < most and time.perf_counter() - start < seconds
    ):
        before = time.perf_counter_ns()
        call()
        durations.append((time.perf_counter_ns() - before) / 1e6)
    return durations


def run_protocol(
    calls: Sequence[Callable[[], object]],
    timing: Timing,
    *,
    clock: Clock = time.perf_counter_ns,
    progress: Progress | None = None,
) -> list[Series]:
    """Time all callables side by side; the first is the one the ratios refer to.

    Two blocks are always timed, so one very slow model can overrun ``max_seconds``. A result
    from fewer than ``min_samples`` samples, with a wide interval, or whose median contradicts its
    ratio is ``noisy``.
    """
    report = _throttled(progress, clock)
    with _no_garbage_collection():
        warmups = []
        for index, call in enumerate(calls):
            report(0.0, f"warming up {index + 1} of {len(calls)}")
            warmups.append(warm_up(call, timing.warmup_seconds, clock))
        samples = _blocks(calls, timing, _burst_length(warmups, timing), clock, report)
    rng = np.random.default_rng(timing.seed)
    intervals = _intervals(samples, rng)
    first = intervals[0][0].value
    return [
        _summary(samples[index], p50, ratio, warmups[index], timing, p50.value / first)
        for index, (p50, ratio) in enumerate(intervals)
    ]


def discredit(series: Series, reason: str) -> Series:
    """The same figures, called noisy for a reason that the intervals cannot see."""
    reasons = [series.withheld] if series.withheld else []
    return replace(series, noisy=True, ratio_noisy=True, withheld="; ".join([*reasons, reason]))


def _burst_length(warmups: Sequence[Warmup], timing: Timing) -> int:
    """Timed calls of a model in one block: few enough that both limits leave enough blocks."""
    one_of_each = sum(warmup.last_ms for warmup in warmups) / 1e3
    fitting = timing.max_seconds / _BLOCKS / one_of_each - 1 if one_of_each > 0 else np.inf
    return int(max(1, min(timing.min_samples // _BLOCKS, fitting)))


def _blocks(
    calls: Sequence[Callable[[], object]],
    timing: Timing,
    burst: int,
    clock: Clock,
    report: Progress,
) -> list[Samples]:
    taken: list[list[list[int]]] = [[] for _ in calls]
    next_check = 0.0
    start = clock()
    for block, order in enumerate(_orders(len(calls), timing.seed), start=1):
        for index in order:
            taken[index].append(_burst(calls[index], burst, clock))
        elapsed = (clock() - start) / _NS
        count = block * burst
        done = min(count / timing.min_samples, elapsed / max(timing.min_seconds, 1e-9))
        report(min(done, 0.95), "timing" if done < 1 else "timing on: the interval is still wide")
        if block % 2:  # a block and its mirror belong together
            continue
        if elapsed >= timing.max_seconds or count >= _MAX_SAMPLES:
            break
        if done >= 1 and elapsed >= next_check:
            next_check = elapsed * _CHECK_GROWTH
            if _narrow(_intervals(_milliseconds(taken), np.random.default_rng(timing.seed))):
                break
    return _milliseconds(taken)


def _burst(call: Callable[[], object], count: int, clock: Clock) -> list[int]:
    call()
    durations = []
    for _ in range(count):
        before = clock()
        call()
        durations.append(clock() - before)
    return durations


def _orders(models: int, seed: int) -> Iterator[list[int]]:
    rng = np.random.default_rng(seed)
    while True:
        order = [int(index) for index in rng.permutation(models)]
        yield order
        yield order[::-1]


def _milliseconds(taken: list[list[list[int]]]) -> list[Samples]:
    # a coarse clock can say 0; a ratio must not divide by it
    return [np.maximum(np.asarray(blocks, dtype=np.float64), 1.0) / 1e6 for blocks in taken]


def _intervals(
    samples: Sequence[Samples], rng: np.random.Generator
) -> list[tuple[Interval, Interval | None]]:
    return [
        (
            median_interval(series, rng),
            paired_ratio(series, samples[0], rng) if index else None,
        )
        for index, series in enumerate(samples)
    ]


def _narrow(intervals: Sequence[tuple[Interval, Interval | None]]) -> bool:
    return all(
        p50.within(_PRECISION) and (ratio is None or ratio.within(_PRECISION))
        for p50, ratio in intervals
    )


def _summary(
    samples: Samples,
    p50: Interval,
    ratio: Interval | None,
    warmup: Warmup,
    timing: Timing,
    quotient: float,
) -> Series:
    p90, no_p90 = percentile(samples, 90)
    p99, no_p99 = percentile(samples, 99)
    short = samples.size < timing.min_samples
    reasons = [reason for reason in (no_p90, no_p99) if reason]
    if short:
        reasons.append(f"max_seconds ended before {timing.min_samples} samples")
    # On a machine of one's own both say the same to 3 % (55 recorded comparisons). Where another
    # process takes its share of every block, long calls meet it more often than short ones, and the
    # medians are its as much as the model's.
    shared = ratio is not None and abs(quotient / ratio.value - 1) > _PRECISION
    if ratio is not None and shared:
        reasons.append(
            f"the medians' quotient is {quotient:.2f}, the undisturbed calls' {ratio.value:.2f}: "
            "something else was running"
        )
    return Series(
        samples=samples,
        p50=p50,
        p90=p90,
        p99=p99,
        withheld="; ".join(reasons) or None,
        noisy=short or shared or not _narrow([(p50, ratio)]),
        ratio=ratio,
        ratio_noisy=short or (ratio is not None and not ratio.within(_PRECISION)),
        warmup=warmup,
    )


def _throttled(progress: Progress | None, clock: Clock) -> Progress:
    """Report twice a second at most: what listens takes time from the machine."""
    last = -1.0

    def report(fraction: float, text: str) -> None:
        nonlocal last
        now = clock() / _NS
        if progress is not None and (last < 0 or now - last >= 0.5):
            last = now
            progress(fraction, text)

    return report


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
