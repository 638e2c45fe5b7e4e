"""Which layers stay in float so that the file is fast on one target: tried, and measured.

A trial is a whole file with some layers in float. It starts with none; profiles beside the float
file say which layers to try next; only a measurement in turns says whether that was better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from deploykit.placement import Comparison, choose_float
from deploykit.types import Data, PassRecord

__all__ = ["STEP_NAME", "Attempt", "Placement", "Trial", "decide", "search"]

STEP_NAME = "optimize_for"


class Trial(Data):
    """A placement that was measured, beside the float file and the best trial before it."""

    float_layers: list[str]
    p50_ms: float
    ratio: float = Field(description="time against the float file's, over interleaved blocks")
    ratio_low: float
    ratio_high: float
    best_ratio: float | None = Field(description="of the best trial so far, in the same run")
    noisy: bool


class Placement(Data):
    """What was decided for a target, and from what."""

    target: str
    baseline: str = Field(description="the fastest float file")
    layers: int = Field(description="how many could be quantised")
    quantise: bool = Field(description="False: no quantised file was faster than the float one")
    float_layers: list[str] = Field(default=[])
    trials: list[Trial]
    reason: str

    def record(self) -> PassRecord:
        """For the report."""
        details = self.model_dump(mode="json", exclude={"reason"})
        return PassRecord(name=STEP_NAME, summary=self.reason, details=details)


@dataclass(frozen=True)
class Attempt:
    """A trial and its profile beside the float file's."""

    floats: frozenset[str]
    trial: Trial
    comparison: Comparison

    @property
    def better(self) -> bool:
        """Faster than the best before it, by more than the interval of its own time."""
        return self.trial.best_ratio is None or self.trial.ratio_high < self.trial.best_ratio


def search(
    attempt: Callable[[frozenset[str], Attempt | None], Attempt], rounds: int
) -> tuple[Attempt, list[Attempt]]:
    """Greedy: put back what is slower; if that isn't faster as a whole, half of it, and so on.

    Args:
        attempt: makes and measures a placement, beside the best one so far.
        rounds: trials at most.

    Returns:
        The fastest trial, and all in the order they were tried.
    """
    best = attempt(frozenset(), None)
    tried = [best]
    additions = _wanted(best)
    while additions and len(tried) < rounds:
        floats = best.floats | frozenset(additions)
        if any(floats == one.floats for one in tried):
            additions = additions[: len(additions) // 2]
            continue
        found = attempt(floats, best)
        tried.append(found)
        if found.better:
            best, additions = found, _wanted(found)
        else:
            additions = additions[: len(additions) // 2]
    return best, tried


def _wanted(best: Attempt) -> list[str]:
    """Layers to put back next, the costliest first; none where nothing but all would help."""
    chosen = choose_float(best.comparison, best.floats)
    if len(chosen) == len(best.comparison.layers):
        return []
    fresh = [x for x in best.comparison.layers if x.name in chosen - best.floats]
    return [layer.name for layer in sorted(fresh, key=lambda layer: -layer.delta)]


def decide(
    target: str, baseline: str, layers: int, best: Attempt, tried: list[Attempt]
) -> Placement:
    """Ship the fastest trial if it beats the fastest float file beyond the noise, else that."""
    trial, first = best.trial, tried[0].trial
    quantise = trial.ratio_high <= 1
    spread = f"{trial.ratio:.2f} ({trial.ratio_low:.2f} … {trial.ratio_high:.2f})"
    count = f"{len(tried)} placement{'s' if len(tried) > 1 else ''} measured"
    if not quantise:
        reason = (
            f"quantisation doesn't pay on {target}: the fastest quantised file takes {spread} of "
            f"the time of {baseline} in float, so all layers stay in float ({count})"
        )
    elif trial.float_layers:
        reason = (
            f"for {target}, {len(trial.float_layers)} of {layers} layers stay in float: {spread} "
            f"of the time of {baseline}, against {first.ratio:.2f} with all quantised ({count})"
        )
    else:
        reason = (
            f"for {target}, all layers are quantised: {spread} of the time of {baseline}, and "
            f"leaving layers in float doesn't make it faster ({count})"
        )
    return Placement(
        target=target,
        baseline=baseline,
        layers=layers,
        quantise=quantise,
        float_layers=trial.float_layers if quantise else [],
        trials=[attempt.trial for attempt in tried],
        reason=reason,
    )
