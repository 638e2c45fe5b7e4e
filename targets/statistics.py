"""Estimators of latency, each with a 95 % bootstrap interval.

Samples come as an array (blocks, calls): the calls of one block ran back to back, so they share
whatever the machine was doing. Blocks, not calls, are therefore what is resampled: calls of one
block are too alike to count as independent, and an interval that treats them so is too narrow.

scipy is imported inside the functions: the process that measures memory must not carry it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Interval",
    "Verdict",
    "median_interval",
    "paired_ratio",
    "percentile",
    "percentile_floor",
    "verdict",
]

Samples = NDArray[np.float64]
Verdict = Literal["faster", "slower", "equal"]

_RESAMPLES = 2000
_BATCH_ELEMENTS = 4_000_000  # bounds the memory of one batch of resamples to 32 MB
_EQUAL_BAND = 0.02


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def within(self, fraction: float) -> bool:
        """Whether both ends are at most ``fraction`` of the value away from it."""
        reach = fraction * self.value
        return self.value - self.low <= reach and self.high - self.value <= reach


def median_interval(samples: Samples, rng: np.random.Generator) -> Interval:
    """Median of all calls, in the unit of the samples. Needs two blocks or more."""

    def statistic(picks: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        assert axis == -1
        pooled = samples[picks].reshape(*picks.shape[:-1], -1)
        return np.asarray(np.median(pooled, axis=-1))

    return _bootstrap(statistic, samples, rng)


def paired_ratio(samples: Samples, original: Samples, rng: np.random.Generator) -> Interval:
    """How many times the original's latency: below 1 is faster. Needs two blocks or more.

    The median over blocks of (fastest call of the block / fastest of the original in the same
    block). What slows a whole block cancels; what slows single calls (the scheduler, another
    process) only ever adds time, so the fastest of a block is the one disturbed least (Chen and
    Revels, "Robust benchmarking in noisy environments", 2016). On ten recorded series of 5 ms calls
    on a crowded core, 4 s each, the blocks' medians left 9 undecided and this none; on a still more
    crowded one 4 s were too short for this, too (12 of 15 undecided), and 30 s were enough. It may
    differ from the quotient of the two medians where one model's own time varies more.
    """
    ratios = samples.min(axis=1) / original.min(axis=1)

    def statistic(picks: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
        assert axis == -1
        return np.asarray(np.median(ratios[picks], axis=-1))

    return _bootstrap(statistic, ratios[:, None], rng)


def verdict(ratio_low: float, ratio_high: float, band: float = _EQUAL_BAND) -> Verdict:
    """What a ratio's interval allows to be said, if the measurement is not noisy.

    A difference is named only when the whole interval lies more than ``band`` (2 %) away from 1:
    less than that is changed by where the linker puts a function, and is not worth a claim.
    """
    if ratio_high < 1 - band:
        return "faster"
    if ratio_low > 1 + band:
        return "slower"
    return "equal"


@cache
def percentile_floor(percent: float, confidence: float = 0.99, slower: int = 1) -> int:
    """Fewest samples from which a percentile may be printed: 64 for p90, 662 for p99.

    A sample is slower than the true p-th percentile with probability 1 - p, independently. With
    n samples of which at most ``slower`` are above the figure printed, the figure is at or above
    the true percentile with ``confidence`` once Binomial(n, 1 - p) gives ``slower`` or fewer with
    probability 1 - confidence at most. From fewer samples the printed tail can be wishful.
    """
    from scipy.stats import binom

    tail = 1 - percent / 100
    count = slower + 1
    while binom.cdf(slower, count, tail) > 1 - confidence:
        count += 1
    return count


def percentile(samples: Samples, percent: float) -> tuple[float | None, str | None]:
    """A percentile that was really observed, or None with the reason it is withheld."""
    floor = percentile_floor(percent)
    if samples.size < floor:
        return None, f"p{percent:g} needs {floor} samples, {samples.size} taken"
    return float(np.percentile(samples, percent, method="higher")), None


def _bootstrap(
    statistic: Callable[..., NDArray[np.float64]], samples: Samples, rng: np.random.Generator
) -> Interval:
    """Percentile bootstrap over blocks. The better-known BCa breaks down on ties of medians."""
    from scipy.stats import bootstrap

    blocks = np.arange(len(samples))
    result = bootstrap(
        (blocks,),
        statistic,
        n_resamples=_RESAMPLES,
        batch=max(1, _BATCH_ELEMENTS // samples.size),
        vectorized=True,
        confidence_level=0.95,
        method="percentile",
        rng=rng,
    )
    interval = result.confidence_interval
    value = float(statistic(blocks))
    # a resampled median can miss the value by a hair where the samples are few
    return Interval(value, min(float(interval.low), value), max(float(interval.high), value))
