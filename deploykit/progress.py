"""Progress on the terminal's error stream: bars for people, one line a step for logs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Reporter", "Steps", "as_fractions", "silent"]


class Steps(Protocol):
    """Shows progress: a context with the name of a step and how much there is to do in it."""

    def __call__(
        self, title: str, total: float | None = None
    ) -> AbstractContextManager[Callable[[float], None]]: ...


@contextlib.contextmanager
def silent(
    title: str,  # noqa: ARG001
    total: float | None = None,  # noqa: ARG001
) -> Iterator[Callable[[float], None]]:
    """No progress."""
    yield lambda _: None


def as_fractions(advance: Callable[[float], None]) -> Callable[[float, str], None]:
    """What a measuring process calls with (share done so far, text), for a step of total 1."""
    seen = 0.0

    def progress(fraction: float, _: str) -> None:
        nonlocal seen
        advance(max(fraction - seen, 0.0))
        seen = max(fraction, seen)

    return progress


class Reporter:
    """Says what the run is doing. Everything goes to standard error."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet

    def note(self, text: str) -> None:
        """One line the user should read."""
        if not self.quiet:
            self.console.print(text, markup=False)

    @contextlib.contextmanager
    def step(self, title: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """A step of the run. Yields a function to call with how much more is done."""
        if self.quiet:
            yield lambda _: None
            return
        if not self.console.is_terminal:
            started = time.monotonic()
            yield lambda _: None
            self.note(f"{title}: {time.monotonic() - started:.1f} s")
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total)
            yield lambda amount: progress.advance(task, amount)
            progress.update(task, total=total or 1, completed=total or 1)
