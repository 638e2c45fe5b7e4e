"""The timing protocol checked against what is known: ``python -m benchmarks.estimator``.

A null model shows what the harness itself costs. On simulated machines of several kinds, and on
this one with matrix products, the protocol times three models side by side: an original, its
equal, and one with 10 % more work. Right is "equal" for the one and "slower" for the other;
"too noisy" is not right, but not wrong either. Both must be right in 95 % of the trials.

It writes ``benchmarks/results/estimator.json`` and ``.md`` after each of the two parts; a part that
isn't asked for (``--real 0``) stays as it was. A file of its own and not an option
of ``deploykit bench``: it judges deploykit's code, not the user's files, and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from benchmarks.simulated_machine import NOISES, Noise, SimulatedMachine
from deploykit.environment import environment
from deploykit.fsio import atomic_write_text
from deploykit.targets.device import Neighbours, pick_cores, pin
from deploykit.targets.protocol import Series, Timing, run_protocol
from deploykit.targets.statistics import verdict

__all__ = ["Tally", "as_markdown", "null_overhead", "pool", "real_trial", "simulated_trial"]

RESULTS = Path(__file__).resolve().parent / "results"
WANTED = 0.95
MORE_WORK = 1.1
_PRODUCTS = 20  # of which 10 % is a whole number
PARTS = ("simulated", "real")
_SIDES = (48, 96, 160)
# Short where the machine is quiet; where it is busy, as long as the product would try.
_REAL = Timing(min_seconds=0.5, warmup_seconds=0.2)

Answer = tuple[str, str]
"""What was said of the equal model, and of the slower one."""


@dataclass(frozen=True)
class Tally:
    """How often the protocol was right, wrong, or said that it can't tell."""

    right: int
    withheld: int
    wrong: int

    @classmethod
    def of(cls, said: Iterable[str], truth: str) -> Tally:
        counts = Counter(said)
        right, withheld = counts.pop(truth, 0), counts.pop("noisy", 0)
        return cls(right, withheld, sum(counts.values()))

    @property
    def trials(self) -> int:
        return self.right + self.withheld + self.wrong

    @property
    def share(self) -> float:
        return self.right / self.trials

    def as_dict(self) -> dict[str, Any]:
        """Counts, the share that was right, and its 95 % Wilson interval."""
        interval = binomtest(self.right, self.trials).proportion_ci(0.95, method="wilson")
        return {
            "trials": self.trials,
            "right": self.right,
            "withheld": self.withheld,
            "wrong": self.wrong,
            "share": self.share,
            "low": float(interval.low),
            "high": float(interval.high),
        }


def _said(series: Series) -> str:
    assert series.ratio is not None
    return "noisy" if series.ratio_noisy else verdict(series.ratio.low, series.ratio.high)


def simulated_trial(noise: Noise, seed: int) -> Answer:
    """Three models on a simulated machine, for as long as the product would time them."""
    rng = np.random.default_rng(seed)
    machine = SimulatedMachine(noise, rng)
    ms = float(np.exp(rng.uniform(np.log(4), np.log(40))))
    calls = [machine.model(ms * factor) for factor in (1, 1, MORE_WORK)]
    _, equal, slower = run_protocol(calls, Timing(seed=seed), clock=machine.clock)
    return _said(equal), _said(slower)


def real_trial(side: int, seed: int) -> Answer:
    """Three models of matrix products on this machine, in this process."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((side, side)).astype(np.float32)

    def products(count: int) -> Callable[[], None]:
        place = np.empty_like(matrix)

        def call() -> None:
            for _ in range(count):
                np.matmul(matrix, matrix, out=place)

        return call

    original = products(_PRODUCTS)
    calls = [original, original, products(round(_PRODUCTS * MORE_WORK))]
    timing = Timing(**{**vars(_REAL), "seed": seed})
    _, equal, slower = run_protocol(calls, timing)
    return _said(equal), _said(slower)


def null_overhead() -> dict[str, float]:
    """Nanoseconds that the harness adds to a call: the time of one that does nothing."""
    (series,) = run_protocol([lambda: None], Timing(min_seconds=1.0, max_seconds=5.0))
    return {
        "p50_ns": series.p50.value * 1e6,
        "p99_ns": float(np.percentile(series.samples, 99, method="higher")) * 1e6,
        "samples": float(series.samples.size),
    }


def _row(name: str, answers: Sequence[Answer]) -> dict[str, Any]:
    equal, slower = zip(*answers, strict=True)
    return {
        "series": name,
        "equal": Tally.of(equal, "equal").as_dict(),
        "slower": Tally.of(slower, "slower").as_dict(),
    }


def pool(name: str, parts: dict[str, list[Answer]]) -> dict[str, Any]:
    """Rows of every part and of all together, and whether what is wanted was held."""
    rows = [_row(part, answers) for part, answers in parts.items()]
    whole = _row(name, [answer for answers in parts.values() for answer in answers])
    held = all(whole[truth]["share"] >= WANTED for truth in ("equal", "slower"))
    return {"rows": rows, "all": whole, "held": held}


def check_simulated(trials: int, seed: int, say: Callable[[str], object]) -> dict[str, Any]:
    """``trials`` of each kind of noise; the same every time, wherever it is run."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    machines: dict[str, list[Answer]] = {}
    for index, (name, noise) in enumerate(NOISES.items()):
        say(name)
        first = seed + 100_000 * index
        machines[name] = [simulated_trial(noise, first + trial) for trial in range(trials)]
    return {"started": started, "seed": seed, **pool("all simulated", machines)}


def check_real(trials: int, seed: int, say: Callable[[str], object]) -> dict[str, Any]:
    """``trials`` of each size of matrix, on this machine as it is."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    pinned = pin(pick_cores(1))
    say("null model")
    null = null_overhead()
    products: dict[str, list[Answer]] = {}
    neighbours = Neighbours(pinned)
    for side in _SIDES:
        name = f"{_PRODUCTS} products of {side} x {side}"
        say(name)
        products[name] = [real_trial(side, seed + trial) for trial in range(trials)]
    return {
        "started": started,
        "seed": seed,
        "environment": environment(),
        "pinned_to": pinned,
        "taken_by_others": neighbours.share(),
        "null": null,
        **pool("all real", products),
    }


def as_markdown(found: dict[str, Any]) -> str:
    """The tables of the parts that there are."""

    def cell(tally: dict[str, Any]) -> str:
        return (
            f"{tally['right']} of {tally['trials']} ({tally['share']:.1%}, "
            f"{tally['low']:.1%} to {tally['high']:.1%}) | {tally['withheld']} | {tally['wrong']}"
        )

    lines = [
        "# The timing protocol, checked against what is known",
        "",
        f"Made by `python -m benchmarks.estimator`. Each trial times an original, its equal and a "
        f"model with {MORE_WORK - 1:.0%} more work side by side. Wanted: equal models called "
        f"equal, and the slower one slower, in {WANTED:.0%} of all trials. Shares with 95 % Wilson "
        'intervals. "Can\'t tell" is the verdict *noisy*: neither right nor wrong.',
    ]
    for name in PARTS:
        if name not in found:
            continue
        part = found[name]
        lines += ["", f"## {name.capitalize()}: {'held' if part['held'] else 'MISSED'}", ""]
        lines.append(f"{part['started']}, seed {part['seed']}.")
        if "null" in part:
            lines[-1] += (
                f" {part['environment']['cpu']}, pinned to core {part['pinned_to']}; other "
                f"processes took {part['taken_by_others']:.0%} of it meanwhile. The harness itself "
                f"takes {part['null']['p50_ns']:.0f} ns of a call (median of "
                f"{part['null']['samples']:.0f} calls of nothing; p99 "
                f"{part['null']['p99_ns']:.0f} ns)."
            )
        lines += [
            "",
            "| series | equal called equal | can't tell | wrong | more work called slower "
            "| can't tell | wrong |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in (*part["rows"], part["all"]):
            lines.append(f"| {row['series']} | {cell(row['equal'])} | {cell(row['slower'])} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 7 where the protocol missed what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--simulated", type=int, default=60, help="trials a kind of noise; 0: none")
    parser.add_argument("--real", type=int, default=12, help="trials a size of matrix; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, default=RESULTS, help="folder")
    chosen = parser.parse_args(arguments)
    file = chosen.out / "estimator.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    held = True
    for name, trials, check in (
        ("real", chosen.real, check_real),
        ("simulated", chosen.simulated, check_simulated),
    ):
        if trials:
            found[name] = check(trials, chosen.seed, lambda text: sys.stderr.write(f"{text}\n"))
            held = held and found[name]["held"]
            atomic_write_text(file, json.dumps(found, indent=1) + "\n")
            atomic_write_text(chosen.out / "estimator.md", as_markdown(found))
    sys.stdout.write(as_markdown(found))
    return 0 if held else 7


if __name__ == "__main__":
    sys.exit(main())
