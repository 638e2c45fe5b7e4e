"""How the recovery shows what it is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["Steps", "silent"]


class Steps(Protocol):
    """Shows progress: a context with the name of a step and how much there is to do in it."""

    def __call__(
        self, title: str, total: float | None = None
    ) -> AbstractContextManager[Callable[[float], None]]: ...


@contextmanager
def silent(title: str, total: float | None = None) -> Iterator[Callable[[float], None]]:  # noqa: ARG001
    """No progress."""
    yield lambda _: None
