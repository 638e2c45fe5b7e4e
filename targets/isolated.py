"""What targets share whose runtime may live in an environment of its own.

In that environment (or where ours has the runtime) the target loads files itself. From ours it
starts a process there and sends the images through a pipe: right for comparing logits, wrong for
timing, so ``measure`` runs the whole measuring process there (``worker_command``), and no pipe
lies inside a timed call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, UsageError, one_line
from deploykit.targets.environments import here, missing
from deploykit.targets.host import Guest, call, guest_command
from deploykit.targets.registry import FloatArray, Runner, joined

__all__ = ["SERVING", "GuestRunner", "IsolatedTarget", "one_by_one"]

_LOAD_SECONDS = 300.0
_RUN_SECONDS = 600.0
SERVING = "deploykit.targets.serving"


class IsolatedTarget:
    """Base of such targets: they name their environment and say what happens inside it."""

    name: str
    formats: tuple[str, ...]
    environment: str

    def available(self) -> str | None:
        """None, or that the environment is not there and the command that makes it.

        Where the runtime is, it is imported, so that loading a file is timed without that.
        """
        reason = missing(self.environment)
        if reason is None and here(self.environment):
            try:
                self.import_inside()
            except ImportError as error:
                return f"the runtime of {self.name} cannot be imported: {one_line(error)}"
        return reason

    def runtime(self) -> str:
        """Name, version and float precision."""
        if here(self.environment):
            return self.runtime_inside()
        return str(self._call("runtime"))

    def kernels(self, path: Path) -> dict[str, int]:
        """What the runtime makes of the file."""
        if here(self.environment):
            return self.kernels_inside(path)
        found = self._call("kernels", path=str(path))
        return {str(name): int(count) for name, count in found.items()}

    def load(self, path: Path, threads: int) -> Runner:
        """A runner for images of any number; see the head of this module for where it runs.

        Raises:
            TargetMissingError: the environment is not there.
            UsageError: the file is not there or the runtime refuses it.
            DeploykitError: the runtime died on it.
        """
        if not path.exists():
            message = f"{path}: no such file"
            raise UsageError(message)
        if here(self.environment):
            return self.load_inside(path, threads)
        guest = Guest(self.environment, guest_command(self.environment, SERVING), threads)
        return GuestRunner(guest, self.name, str(path.absolute()), threads)

    def worker_command(self, module: str) -> tuple[str, ...]:
        """The argument list that runs one of our modules where the runtime is."""
        return guest_command(self.environment, module)

    def import_inside(self) -> None:
        """Import what ``load`` needs, in the environment."""
        raise NotImplementedError

    def runtime_inside(self) -> str:
        """``runtime``, in the environment."""
        raise NotImplementedError

    def kernels_inside(self, path: Path) -> dict[str, int]:
        """``kernels``, in the environment."""
        raise NotImplementedError

    def load_inside(self, path: Path, threads: int) -> Runner:
        """``load``, in the environment."""
        raise NotImplementedError

    def _call(self, what: str, **arguments: str) -> Any:
        function = f"{__name__}:ask_target_{what}"
        return call(self.environment, function, _LOAD_SECONDS, target=self.name, **arguments)


def ask_target_runtime(target: str) -> str:
    """For the process in the environment."""
    from deploykit.targets.registry import get_target

    return get_target(target).runtime()


def ask_target_kernels(target: str, path: str) -> dict[str, int]:
    """For the process in the environment."""
    from deploykit.targets.registry import get_target

    return get_target(target).kernels(Path(path))


class GuestRunner:
    """A file loaded in another process, which ends with this object.

    Raises:
        DeploykitError: as ``Target.load``; the process has ended.
    """

    def __init__(self, guest: Guest, target: str, path: str, threads: int) -> None:
        request = {"do": "load", "target": target, "path": path, "threads": threads}
        self._guest = guest
        try:
            self._runner = guest.ask_for("runner", request, timeout=_LOAD_SECONDS)
        except BaseException:
            guest.close()
            raise

    def __call__(self, images: FloatArray, /) -> FloatArray:
        batch = np.ascontiguousarray(images, dtype=np.float32)
        request = {"do": "run", "runner": self._runner}
        _, logits = self._guest.ask(request, batch, timeout=_RUN_SECONDS)
        if logits is None or len(logits) != len(images):
            message = f"the process of the runtime sent no logits for {len(images)} images"
            raise MeasurementError(message)
        return logits


def one_by_one(run: Runner) -> Runner:
    """A runner of any number of images from one that takes a single image.

    Files for phones are made for one image at a time: a batch is its images one after another.
    """

    def run_all(images: FloatArray, /) -> FloatArray:
        batch = np.ascontiguousarray(images, dtype=np.float32)
        return np.concatenate([joined(run(batch[i : i + 1])) for i in range(len(batch))])

    return run_all
