"""Where a target's files are timed: on this machine, or on the target's own device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from deploykit.targets.child import WORKER, ask
from deploykit.targets.device import allowed_cores, pick_cores
from deploykit.targets.registry import Target

__all__ = ["Here", "Place", "place_of"]

_WORKER_MODULE = "deploykit.targets.worker"


class Place(Protocol):
    """A machine that times files."""

    def allowed_cores(self) -> list[int]:
        """Logical cores that a process there may run on."""
        ...

    def pick_cores(self, threads: int) -> list[int]:
        """The best ``threads`` of them to measure on."""
        ...

    def ask(
        self,
        request: Mapping[str, Any],
        *,
        progress: Callable[[float, str], None] | None = None,
        silence_seconds: float,
    ) -> dict[str, Any]:
        """The answer of a measuring process there, as ``child.ask``.

        Raises:
            DeploykitError: as ``child.ask``.
        """
        ...


class Here:
    """This machine, in the environment that the target's runtime has."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def allowed_cores(self) -> list[int]:
        """As ``device.allowed_cores``."""
        return allowed_cores()

    def pick_cores(self, threads: int) -> list[int]:
        """As ``device.pick_cores``."""
        return pick_cores(threads)

    def ask(
        self,
        request: Mapping[str, Any],
        *,
        progress: Callable[[float, str], None] | None = None,
        silence_seconds: float,
    ) -> dict[str, Any]:
        """As ``child.ask``."""
        # a runtime with an environment of its own is measured by a process there
        elsewhere = getattr(self._target, "worker_command", None)
        command = WORKER if elsewhere is None else elsewhere(_WORKER_MODULE)
        return ask(request, progress=progress, silence_seconds=silence_seconds, command=command)


def place_of(target: Target) -> Place:
    """The target's ``place`` if it has one, else this machine."""
    place: Place | None = getattr(target, "place", None)
    return Here(target) if place is None else place
