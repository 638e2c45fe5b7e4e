"""The check of the timing protocol: simulated machines through the real protocol, and its tables.

``python -m benchmarks.estimator`` runs hundreds of these, and real ones.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.estimator import Tally, as_markdown, pool, simulated_trial
from benchmarks.simulated_machine import NOISES, Noise, SimulatedMachine


@pytest.mark.parametrize("name", NOISES)
def test_simulated_machines_do_not_mislead_the_protocol(name: str) -> None:
    answers = [simulated_trial(NOISES[name], seed) for seed in range(3)]
    equal, slower = zip(*answers, strict=True)
    assert set(equal) <= {"equal", "noisy"}
    assert set(slower) <= {"slower", "noisy"}
    assert equal.count("equal") >= 2
    assert slower.count("slower") >= 2


def test_a_hopeless_machine_is_not_judged() -> None:
    assert simulated_trial(Noise(jitter=3.0), 0) == ("noisy", "noisy")


def test_the_machine_is_as_bad_as_asked() -> None:
    def times(noise: Noise, calls: int = 4000) -> np.ndarray:
        machine = SimulatedMachine(noise, np.random.default_rng(1))
        call, ticks = machine.model(10.0), [0]
        for _ in range(calls):
            call()
            ticks.append(machine.clock())
        return np.diff(ticks) / 1e6

    assert np.median(times(Noise(jitter=0.05))) == pytest.approx(10, rel=0.01)
    assert np.std(np.log(times(Noise(jitter=0.05)))) == pytest.approx(0.05, rel=0.05)
    assert np.mean(times(Noise(spikes=0.05)) > 25) == pytest.approx(0.05, abs=0.012)
    drifting = times(Noise(drift=0.3), 1000)  # a little more than ten seconds
    assert drifting[-1] / drifting[0] == pytest.approx(1.3, abs=0.15)
    wandering = np.log(times(Noise(jitter=0.001, wander=0.05)))
    assert np.corrcoef(wandering[:-1], wandering[1:])[0, 1] > 0.9
    speeds = times(Noise(jitter=0.001, slow=1.5))
    assert np.mean(speeds > 12.5) == pytest.approx(0.55, abs=0.2)


def test_tallies_keep_wrong_apart_from_undecided() -> None:
    tally = Tally.of(["equal"] * 95 + ["noisy"] * 3 + ["slower", "faster"], "equal")
    assert (tally.right, tally.withheld, tally.wrong, tally.share) == (95, 3, 2, 0.95)
    # Wilson's interval by its formula, z = 1.959964
    found, z, n, p = tally.as_dict(), 1.959964, 100, 0.95
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert found["low"] == pytest.approx(middle - reach, abs=1e-6)
    assert found["high"] == pytest.approx(middle + reach, abs=1e-6)


def test_a_miss_is_called_one() -> None:
    right, undecided = ("equal", "slower"), ("noisy", "noisy")
    assert pool("a", {"x": [right] * 19 + [undecided]})["held"]
    missed = pool("a", {"x": [right] * 18 + [undecided] * 2})
    assert not missed["held"]
    facts = {"started": "now", "seed": 0}
    real = {
        "pinned_to": [0],
        "environment": {"cpu": "a"},
        "taken_by_others": 0.5,
        "null": {"p50_ns": 70.0, "p99_ns": 90.0, "samples": 9.0},
    }
    simulated = {**facts, **pool("b", {"x": [right] * 20})}
    text = as_markdown({"simulated": simulated, "real": {**facts, **real, **missed}})
    assert "## Simulated: held" in text
    assert "## Real: MISSED" in text
    assert "18 of 20 (90.0%" in text
    assert "Real" not in as_markdown({"simulated": simulated})
