"""Which values a trial tries: a function of its number, the seed and finished generations alone.

So a sweep that was killed goes on as if it had not been. Optuna's samplers (Akiba et al., "Optuna:
A Next-generation Hyperparameter Optimization Framework", KDD 2019) are seeded anew for each trial,
and see the trials of earlier generations in the order of their numbers, however they finished.
``grid`` and ``random`` look at no result. ``tpe`` and ``nsga2`` do: they repeat themselves as far
as the results do, which accuracy and size do to the digit and latencies don't.
"""

from __future__ import annotations

import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from deploykit.errors import TargetMissingError
from deploykit.sweep.spec import Objective, Range, Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

__all__ = ["DEFAULT_TRIALS", "Suggestion", "Suggestions", "directions", "import_optuna"]

DEFAULT_TRIALS = 32


class Suggestion(NamedTuple):
    """What a trial tries, and how Optuna keeps it."""

    number: int
    values: dict[str, Any]
    params: dict[str, Any]
    system_attrs: dict[str, Any]


def import_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        TargetMissingError: it isn't installed.
    """
    try:
        import optuna
    except ImportError as error:
        message = "sweeps need optuna: pip install 'deploykit-vision[sweep]'"
        raise TargetMissingError(message) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def directions(objectives: Sequence[Objective]) -> list[str]:
    """Optuna's words for which way each objective goes."""
    return ["maximize" if name == "top1" else "minimize" for name in objectives]


class Suggestions:
    """The trials of a sweep, in generations that are chosen together."""

    def __init__(self, sweep: Sweep) -> None:
        self._optuna = import_optuna()
        self._sweep = sweep
        self.distributions: dict[str, BaseDistribution] = {
            key: self._distribution(choices) for key, choices in sweep.dimensions.items()
        }
        spec = sweep.spec
        self._grid: list[dict[str, Any]] = []
        if spec.sampler == "grid":
            self._grid = sweep.grid
            # in an order that covers the whole early, and of which fewer trials are the beginning
            random.Random(spec.seed).shuffle(self._grid)  # noqa: S311  no secret
            self.count = min(spec.trials or len(self._grid), len(self._grid))
        else:
            self.count = spec.trials or DEFAULT_TRIALS

    def generations(self) -> list[range]:
        """Numbers of the trials that are chosen from the same knowledge."""
        learns = self._sweep.spec.sampler in ("tpe", "nsga2")
        size = self._sweep.spec.generation if learns else self.count
        return [range(n, min(n + size, self.count)) for n in range(0, self.count, size)]

    def suggest(self, number: int, earlier: Sequence[FrozenTrial]) -> Suggestion:
        """What trial ``number`` tries.

        Args:
            earlier: the trials of all earlier generations, by number.
        """
        if self._grid:
            values = self._grid[number]
            return Suggestion(number, values, self._params(values), {})
        study = self._optuna.create_study(
            directions=directions(self._sweep.objectives), sampler=self._sampler(number)
        )
        study.add_trials(earlier)
        asked = study.ask(self.distributions)
        kept = study.trials[-1].system_attrs
        return Suggestion(number, self._values(asked.params), dict(asked.params), dict(kept))

    def _sampler(self, number: int) -> BaseSampler:
        spec, samplers = self._sweep.spec, self._optuna.samplers
        digest = hashlib.sha256(f"{spec.seed} {number}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        sampler: BaseSampler
        if spec.sampler == "random":
            sampler = samplers.RandomSampler(seed=seed)
        elif spec.sampler == "tpe":
            sampler = samplers.TPESampler(seed=seed, n_startup_trials=spec.generation)
        else:
            sampler = samplers.NSGAIISampler(seed=seed, population_size=spec.generation)
        return sampler

    def _distribution(self, choices: Any) -> BaseDistribution:
        kinds = self._optuna.distributions
        distribution: BaseDistribution
        if isinstance(choices, Range):
            kind = kinds.IntDistribution if choices.whole else kinds.FloatDistribution
            step = choices.step or (1 if choices.whole else None)
            high = choices.points()[-1] if step and not choices.log else choices.high
            distribution = kind(choices.low, high, log=choices.log, step=step)
        else:
            # as JSON: Optuna's categories are plain values, and ours may be lists
            distribution = kinds.CategoricalDistribution([json.dumps(c) for c in choices])
        return distribution

    def _params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value if isinstance(self._sweep.dimensions[key], Range) else json.dumps(value)
            for key, value in values.items()
        }

    def _values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        def value(key: str) -> Any:
            if not isinstance(self._sweep.dimensions[key], Range):
                return json.loads(params[key])
            number = params[key]
            return round(number, 12) if isinstance(number, float) else number

        return {key: value(key) for key in self._sweep.dimensions}
