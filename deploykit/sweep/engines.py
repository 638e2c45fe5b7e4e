"""Where trials run: on this machine, or on a Ray cluster."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from deploykit.errors import TargetMissingError, UsageError, one_line
from deploykit.sweep.trial import TrialRequest, run_trial
from deploykit.targets.device import physical_cores

__all__ = ["Engine", "LocalEngine", "RayEngine"]

Outcome = tuple[TrialRequest, dict[str, Any]]


class Engine(Protocol):
    """Runs trials and gives their outcomes as they come."""

    def run(self, requests: Sequence[TrialRequest]) -> Iterator[Outcome]: ...

    def close(self) -> None: ...


class LocalEngine:
    """Several trials at a time on this machine, each on physical cores of its own.

    Raises:
        UsageError: more workers than there are cores for.
    """

    def __init__(self, workers: int, threads: int) -> None:
        cores = len(physical_cores())
        if workers * threads > cores:
            raise UsageError(
                f"--workers {workers} with {threads} threads each want {workers * threads} "
                f"physical cores, this process may run on {cores}; take fewer"
            )
        if workers > 1 and not hasattr(os, "sched_setaffinity"):
            raise UsageError("this system can't keep trials on cores of their own: --workers 1")
        self._workers = workers
        self._stop = threading.Event()

    def run(self, requests: Sequence[TrialRequest]) -> Iterator[Outcome]:
        with concurrent.futures.ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(run_trial, r, self._stop): r for r in requests}
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield futures[future], future.result()
            finally:  # also on Ctrl-C
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._stop.clear()

    def close(self) -> None:
        """Nothing is left running."""


class RayEngine:
    """Trials as tasks of a Ray cluster (Moritz et al., OSDI 2018); Ray counts the cores, and on
    every machine the trials take physical cores of their own as they do here.

    Args:
        address: of the cluster, such as ``auto`` or ``ray://head:10001``; None: one is started
            here, of ``workers`` workers, and ended with the sweep.

    Raises:
        TargetMissingError: Ray isn't installed, or the cluster can't be reached.
    """

    def __init__(self, address: str | None, workers: int, threads: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no telemetry
        try:
            import ray
        except ImportError as error:
            message = "--engine ray needs Ray: pip install 'deploykit-vision[ray]'"
            raise TargetMissingError(message) from error
        self._ray = ray
        options: dict[str, Any] = {"address": address} if address else {
            "address": "local", "num_cpus": workers * threads, "include_dashboard": False,
        }  # fmt: skip
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # ConnectionError, or one of Ray's many
            message = f"cannot reach the Ray cluster {address or 'here'}: {one_line(error)}"
            raise TargetMissingError(message) from error
        # A machine that dies takes its trials with it: they go on elsewhere.
        self._task = ray.remote(num_cpus=threads, max_retries=3)(run_trial)

    def run(self, requests: Sequence[TrialRequest]) -> Iterator[Outcome]:
        waiting = {self._task.remote(request): request for request in requests}
        try:
            while waiting:
                for done in self._ray.wait(list(waiting), num_returns=1)[0]:
                    request = waiting.pop(done)
                    try:
                        yield request, self._ray.get(done)
                    except self._ray.exceptions.RayError as error:
                        reason = f"ray: {one_line(error)}"
                        yield request, {"state": "failed", "reason": reason, "exit_code": 1}
        finally:
            for task in waiting:
                self._ray.cancel(task, force=True)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()
