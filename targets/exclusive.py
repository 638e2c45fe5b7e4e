"""Cores and turns among processes of one machine that share it: nobody computes where one measures.

Locks are files, held by the system for as long as the holder lives: a killed process holds none.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from deploykit.errors import UsageError
from deploykit.targets.device import allowed_cores, physical_cores, pin

__all__ = ["MEASURE_LOCK", "claim_cores", "lock_folder", "measuring_alone"]

MEASURE_LOCK = "DEPLOYKIT_MEASURE_LOCK"
"""Environment variable: a file. Who measures holds its lock; unset, nobody is waited for."""

_PAUSE_SECONDS = 0.2


def lock_folder() -> Path:
    """Where this user's processes on this machine keep their locks; not a shared file system."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"deploykit-locks-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextlib.contextmanager
def claim_cores(
    threads: int, folder: Path | None = None, waiting: Callable[[], None] | None = None
) -> Iterator[list[int]]:
    """Keep this process on ``threads`` physical cores that no other claimer here has.

    Waits until so many are free. The logical cores of the claimed ones are yielded, sorted.
    Call it before a library counts the cores. Where a system can't keep processes on cores
    (macOS), all are claimed: one process at a time.

    Args:
        folder: of the locks; ``lock_folder()`` if None.
        waiting: called once when there is something to wait for.

    Raises:
        UsageError: this process may not run on so many cores.
    """
    cores = physical_cores()
    if threads > len(cores):
        message = f"{threads} physical cores wanted, but this process may run on {len(cores)}"
        raise UsageError(message)
    folder = folder or lock_folder()
    wanted = threads if hasattr(os, "sched_setaffinity") else len(cores)
    before = allowed_cores()
    with contextlib.ExitStack() as held:
        claimed = _claim(cores, wanted, folder, held)
        if not claimed and waiting is not None:
            waiting()
        while not claimed:
            # of different length, so that two that want several cores don't meet for ever
            time.sleep(_PAUSE_SECONDS * (0.5 + random.random()))  # noqa: S311
            claimed = _claim(cores, wanted, folder, held)
        logical = sorted(core for group in claimed for core in group)
        pin(logical)
        try:
            yield logical
        finally:
            pin(before)


def _claim(
    cores: list[list[int]], wanted: int, folder: Path, held: contextlib.ExitStack
) -> list[list[int]]:
    """So many of ``cores``, their locks left with ``held``; or none at all."""
    with contextlib.ExitStack() as attempt:
        claimed: list[list[int]] = []
        for group in cores:
            with contextlib.suppress(Timeout):
                attempt.enter_context(_lock(folder / f"core-{group[0]}.lock", timeout=0))
                claimed.append(group)
            if len(claimed) == wanted:
                held.push(attempt.pop_all())
                return claimed
    return []


@contextlib.contextmanager
def measuring_alone() -> Iterator[None]:
    """Hold the lock of the file that ``DEPLOYKIT_MEASURE_LOCK`` names, if it names one."""
    path = os.environ.get(MEASURE_LOCK)
    if not path:
        yield
        return
    with _lock(Path(path), timeout=-1):
        yield


def _lock(path: Path, timeout: float) -> FileLock:
    return FileLock(path, timeout=timeout, thread_local=False)
