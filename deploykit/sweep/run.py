"""The sweep: choose, run, record, until every trial has its result; then say which are best."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deploykit.environment import version
from deploykit.errors import UsageError, one_line
from deploykit.fsio import atomic_write_text, ensure_directory, remove
from deploykit.progress import Reporter
from deploykit.recipe_io import dump_recipe
from deploykit.report.sweep_page import render_page
from deploykit.sweep.engines import Engine
from deploykit.sweep.result import SweepReport, TrialResult, best_of, front_of
from deploykit.sweep.sampling import Suggestion, Suggestions
from deploykit.sweep.spec import Sweep
from deploykit.sweep.store import Store
from deploykit.sweep.trial import COMPRESS, TrialRequest

__all__ = ["run_sweep", "sweep_threads"]

_STAMP = "sweep-key.json"
_OURS = (_STAMP, "sweep.json", "sweep.html", "sweep.db", "trials", "logs", "best")


def sweep_threads(sweep: Sweep) -> int:
    """Physical cores that a trial needs: the most threads one of its latency runs has."""
    asked = sweep.dimensions.get("measure.threads", [])
    values = asked if isinstance(asked, list) else asked.points()
    numbers = [int(v) for v in values if isinstance(v, int | float)]
    return max([*numbers, *(base.measure.threads for base in sweep.bases.values())])


def run_sweep(
    sweep: Sweep,
    out: Path,
    *,
    engine: Engine,
    command: str,
    reporter: Reporter,
    storage: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    retry_failed: bool = False,
    work: str = COMPRESS,
) -> SweepReport:
    """Run what is still to run of a sweep and write sweep.json, sweep.html and the best recipes.

    Every trial has its folder, ``out/trials/<number>-<hash>``, an ordinary run's output. A trial
    whose recipe was run before is not run again; a failed one is recorded and the sweep goes on.

    Args:
        storage: database URL of Optuna's; a SQLite file in ``out`` if None.
        resume: go on with the same sweep in ``out``; more trials and other limits may be asked.
        retry_failed: run the failed trials of an earlier start again.
        work: what a trial's process calls, as ``module:function``.

    Raises:
        UsageError: the folder is another's or in use; the storage can't be opened.
        TargetMissingError: Optuna isn't installed.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    suggestions = Suggestions(sweep)
    _open_folder(out, sweep.key, resume=resume, overwrite=overwrite)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"output {out}: another sweep runs in it; wait for its end") from None
    with contextlib.ExitStack() as held:
        held.callback(lock.release)  # entering the lock would hold it twice
        url = storage or f"sqlite:///{(out / 'sweep.db').absolute()}"
        store = Store(url, sweep, suggestions.distributions)
        job = _Job(sweep, out, store, engine, reporter, command, work)
        known = job.recorded(retry_failed)
        for generation in suggestions.generations():
            earlier = store.trials(before=generation.start)
            chosen = [suggestions.suggest(number, earlier) for number in generation]
            job.run([one for one in chosen if one.number not in known])
        results = sorted(store.results(), key=lambda one: one.number)[: suggestions.count]
        report = _report(sweep, results, command, started, time.monotonic() - clock)
        _write(report, sweep, out)
        store.close()
    return report


class _Job:
    def __init__(
        self,
        sweep: Sweep,
        out: Path,
        store: Store,
        engine: Engine,
        reporter: Reporter,
        command: str,
        work: str,
    ) -> None:
        self.work = work
        self.sweep, self.out, self.store, self.engine = sweep, out, store, engine
        self.reporter, self.command = reporter, command
        self.threads = sweep_threads(sweep)

    def recorded(self, retry_failed: bool) -> set[int]:
        """Numbers of the trials that have a result already."""
        if retry_failed:
            self.store.forget_failed()
        found = {result.number for result in self.store.results()}
        if found:
            self.reporter.note(f"{len(found)} trials are done")
        return found

    def run(self, chosen: Sequence[Suggestion]) -> None:
        """Run the chosen trials, and record every one as soon as it has a result."""
        first = {
            result.recipe_sha256: result.number
            for result in reversed(self.store.results())
            if result.same_as is None
        }
        requests: list[TrialRequest] = []
        asked: dict[int, tuple[Suggestion, str, str]] = {}
        copies: list[tuple[Suggestion, str]] = []
        for one in chosen:
            try:
                text = dump_recipe(self.sweep.recipe(one.values))
            except UsageError as error:  # values that don't go together
                self._record(one, {"state": "failed", "reason": one_line(error), "exit_code": 2})
                continue
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest in first:
                copies.append((one, digest))
                continue
            first[digest] = one.number
            name = f"{one.number:04d}-{digest[:8]}"
            asked[one.number] = (one, digest, name)
            requests.append(self._request(one, name))
        for request, outcome in self.engine.run(requests) if requests else ():
            one, digest, name = asked[request["number"]]
            self._record(one, outcome, recipe_sha256=digest, folder=f"trials/{name}")
        for one, digest in copies:
            same = next(r for r in self.store.results() if r.number == first[digest])
            fields = same.model_dump(exclude={"number", "values"})
            self._record(one, {**fields, "same_as": same.number})

    def _request(self, one: Suggestion, name: str) -> TrialRequest:
        trials = ensure_directory(self.out / "trials")
        return TrialRequest(
            number=one.number,
            recipe=self.sweep.recipe(one.values).model_dump(mode="json", exclude_unset=True),
            out=str((trials / name).absolute()),
            log=str((self.out / "logs" / f"{name}.log").absolute()),
            threads=self.threads,
            minutes=self.sweep.spec.trial_minutes,
            command=self.command,
            work=self.work,
        )

    def _record(self, one: Suggestion, outcome: dict[str, Any], **more: str) -> None:
        facts = {"recipe_sha256": "", "folder": "", **outcome, **more}
        result = TrialResult.model_validate({**facts, "number": one.number, "values": one.values})
        lacking = [n for n in self.sweep.objectives if result.objective(n) is None]
        if result.state == "complete" and lacking:
            why = "are its weights untrained?" if lacking[0] == "top1" else "was it measured?"
            reason = f"has no {lacking[0]}: {why}"
            result = result.model_copy(update={"state": "failed", "reason": reason})
        self.store.record(result, one)
        values = ", ".join(f"{k}={v}" for k, v in one.values.items())
        self.reporter.note(f"trial {one.number}: {values}: {_said(result, self.sweep)}")


def _said(result: TrialResult, sweep: Sweep) -> str:
    if result.state == "failed":
        return f"failed: {result.reason}"
    figures = ", ".join(f"{n} {result.objective(n):.4g}" for n in sweep.objectives)
    return figures if result.same_as is None else f"{figures} (as trial {result.same_as})"


def _open_folder(out: Path, key: str, *, resume: bool, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out}: wanted a folder, got a file; choose another -o")
    stamp = out / _STAMP
    occupied = out.exists() and any(out.iterdir())
    if occupied and resume:
        try:
            earlier = json.loads(stamp.read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"output {out}: no sweep to resume; choose another -o") from None
        if earlier != key:
            raise UsageError(
                f"output {out}: the sweep in it is of other recipes, keys, sampler or seed; "
                "give the same file, or start over with --overwrite"
            )
        return
    if occupied and not overwrite:
        raise UsageError(f"output {out} isn't empty: use --overwrite, --resume or another -o")
    if occupied:
        if not stamp.exists():
            raise UsageError(f"output {out}: has files no sweep made; choose another -o")
        for name in _OURS:
            remove(out / name)
    ensure_directory(out)
    atomic_write_text(stamp, json.dumps({"key": key}))


def _report(
    sweep: Sweep, results: list[TrialResult], command: str, started: datetime, seconds: float
) -> SweepReport:
    objectives, limits = sweep.objectives, sweep.spec.limits
    front = front_of(results, objectives, limits)
    members = [r for r in results if r.number in set(front)]
    warnings = [
        f"trial {r.number}: latency on {t.target} is too noisy to use"
        for r in members
        for t in r.times
        if t.noisy
    ]
    devices = {t.device for r in results for t in r.times}
    if len(devices) > 1:
        warnings.append(
            f"measured on {len(devices)} kinds of machine: ratios compare, milliseconds don't"
        )
    return SweepReport(
        deploykit_version=version(),
        command=command,
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        key=sweep.key,
        sampler=sweep.spec.sampler,
        seed=sweep.spec.seed,
        objectives=objectives,
        dimensions={
            k: v if isinstance(v, list) else v.model_dump(exclude_none=True)
            for k, v in sweep.dimensions.items()
        },
        limits=limits,
        trials=results,
        front=front,
        best=best_of(members, objectives),
        warnings=warnings,
    )


def _write(report: SweepReport, sweep: Sweep, out: Path) -> None:
    folder = ensure_directory(out / "best")
    for name, number in report.best.items():
        recipe = sweep.recipe(report.trial(number).values)
        atomic_write_text(folder / f"{name}.yaml", dump_recipe(recipe))
    atomic_write_text(out / "sweep.html", render_page(report))
    atomic_write_text(out / "sweep.json", report.to_json())
