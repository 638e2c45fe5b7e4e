"""A machine with a clock of its own: what it runs takes a known time, and it is as bad as asked.

The noise is what benchmarks meet: skewed jitter of each call, drift over the whole run, rare
spikes, and states that last for many calls and hit all models alike (a neighbour, the clock
frequency), as a first-order autoregressive process and as jumps between two speeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["NOISES", "Noise", "SimulatedMachine"]


@dataclass(frozen=True)
class Noise:
    """How bad the machine is.

    Attributes:
        jitter: standard deviation of the logarithm of each call's time.
        drift: share by which the machine is slower after 10 s; it grows linearly.
        spikes: share of calls that take three times as long.
        wander: standard deviation of the logarithm of the machine's speed, which forgets itself
            within half a second.
        slow: how many times slower the machine is in its slow state; both states last for about
            half a second.
    """

    jitter: float = 0.02
    drift: float = 0.0
    spikes: float = 0.0
    wander: float = 0.0
    slow: float = 1.0


NOISES = {
    "lognormal": Noise(jitter=0.05),
    "drift": Noise(drift=0.3),
    "spikes": Noise(spikes=0.05),
    "autocorrelated": Noise(wander=0.05),
    "two speeds": Noise(slow=1.5),
    "all of it": Noise(jitter=0.05, drift=0.2, spikes=0.03, wander=0.03, slow=1.3),
}

_MEMORY_S = 0.5


class SimulatedMachine:
    """Runs models on a clock in nanoseconds that only their calls move."""

    def __init__(self, noise: Noise, rng: np.random.Generator) -> None:
        self._noise, self._rng = noise, rng
        self._now = 0.0
        self._state = float(noise.wander * rng.standard_normal())
        self._slow = bool(rng.random() < 0.5)

    def clock(self) -> int:
        return int(self._now)

    def model(self, ms: float) -> Callable[[], None]:
        """A model whose median is ``ms`` on the quiet machine."""

        def call() -> None:
            noise, rng = self._noise, self._rng
            seconds = ms / 1e3 * math.exp(noise.jitter * rng.standard_normal())
            seconds *= 1 + noise.drift * self._now / 1e10
            if rng.random() < noise.spikes:
                seconds *= 3
            seconds *= math.exp(self._state) * (noise.slow if self._slow else 1)
            self._now += seconds * 1e9
            kept = math.exp(-seconds / _MEMORY_S)
            fresh = noise.wander * math.sqrt(1 - kept**2)
            self._state = kept * self._state + fresh * rng.standard_normal()
            if rng.random() > kept:
                self._slow = not self._slow

        return call
