"""Finished trials in Optuna's database: SQLite in the sweep's folder, or any SQL server.

Only finished trials are written, each in one transaction: a kill leaves none half done, and none
"running" that would have to be put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deploykit.errors import UsageError, one_line
from deploykit.sweep.result import TrialResult
from deploykit.sweep.sampling import Suggestion, directions, import_optuna
from deploykit.sweep.spec import Sweep

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["Store"]

_RESULT = "deploykit"
"""Name of the trial's attribute that holds its ``TrialResult``."""


class Store:
    """The study of one sweep.

    Raises:
        UsageError: the database can't be opened or isn't Optuna's.
    """

    def __init__(
        self, url: str, sweep: Sweep, distributions: Mapping[str, BaseDistribution]
    ) -> None:
        self._optuna = import_optuna()
        self._distributions = dict(distributions)
        self._objectives = sweep.objectives
        if "://" not in url:
            raise UsageError(f"--storage: wanted a URL such as postgresql://…, got {url!r}")
        try:
            self._storage = self._optuna.storages.RDBStorage(url)
            self._study = self._optuna.create_study(
                storage=self._storage,
                study_name=f"deploykit-{sweep.key}",
                directions=directions(sweep.objectives),
                load_if_exists=True,
            )
        except Exception as error:  # SQLAlchemy's, Optuna's, a driver's that isn't installed
            raise UsageError(f"--storage {url}: can't be opened: {one_line(error)}") from error
        self._kept: dict[int, tuple[FrozenTrial, TrialResult]] = {}
        for trial in self._study.get_trials(deepcopy=False):
            if _RESULT in trial.user_attrs:  # the last one, where a failed trial was run again
                result = TrialResult.model_validate(trial.user_attrs[_RESULT])
                self._kept[result.number] = (trial, result)

    def results(self) -> list[TrialResult]:
        """Of all finished trials, by number."""
        return [self._kept[number][1] for number in sorted(self._kept)]

    def trials(self, before: int) -> list[FrozenTrial]:
        """Optuna's trials with a number below ``before``, by number."""
        return [self._kept[number][0] for number in sorted(self._kept) if number < before]

    def forget_failed(self) -> None:
        """Have failed trials run again; their records stay in the database."""
        self._kept = {
            number: kept for number, kept in self._kept.items() if kept[1].state == "complete"
        }

    def record(self, result: TrialResult, suggestion: Suggestion) -> None:
        """Write a finished trial."""
        states = self._optuna.trial.TrialState
        done = result.state == "complete"
        values: list[Any] = [result.objective(name) for name in self._objectives]
        trial: FrozenTrial = self._optuna.trial.create_trial(
            state=states.COMPLETE if done else states.FAIL,
            values=values if done else None,
            params=suggestion.params,
            distributions=self._distributions,
            user_attrs={_RESULT: result.model_dump(mode="json")},
            system_attrs=suggestion.system_attrs,
        )
        self._study.add_trial(trial)
        self._kept[result.number] = (trial, result)

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()
