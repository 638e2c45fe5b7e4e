"""Targets are found by name; a new target is one new file with the decorator.

The target ``cpu-onnxruntime`` lives in ``cpu_onnxruntime.py``: kind of device, underscore,
runtime (``coreml`` is both at once). A file whose first word is a kind of device is a target, all
others are helpers. Only the file that is asked for is imported, and a target imports its runtime
only when it is used, so listing targets is cheap. Other packages join through the entry-point
group ``deploykit.targets``.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deploykit.errors import TargetMissingError, UsageError, one_line

__all__ = [
    "ENTRY_POINT_GROUP",
    "Outputs",
    "Runner",
    "Target",
    "as_outputs",
    "get_target",
    "joined",
    "list_targets",
    "register_target",
    "wanted_outputs",
]

ENTRY_POINT_GROUP = "deploykit.targets"

_KINDS = ("coreml", "cpu", "cuda", "mobile")
"""Kinds of device: the first words of the files that are targets."""

FloatArray = NDArray[np.float32]


Outputs = FloatArray | tuple[FloatArray, ...]
"""Of one call: logits float32 (N, classes), or feature maps (N, C, H, W) in the file's order.

A file with several outputs gives a tuple; joining them would be timed with the model.
"""


class Runner(Protocol):
    """A loaded artefact: images float32 (N, 3, S, S) to its outputs."""

    def __call__(self, images: FloatArray, /) -> Outputs: ...


def wanted_outputs(ranks: Sequence[int]) -> list[int]:
    """Which of a file's outputs are asked for: all if they are feature maps, else the first."""
    return list(range(len(ranks))) if set(ranks) == {4} else [0]


def as_outputs(made: tuple[FloatArray, ...]) -> Outputs:
    """What a runner gives: the array of a file with one output, else all of them."""
    return made[0] if len(made) == 1 else made


def joined(outputs: Outputs) -> FloatArray:
    """Logits as they are; feature maps flattened and joined image by image, (N, total)."""
    maps = outputs if isinstance(outputs, tuple) else (outputs,)
    if maps[0].ndim != 4:
        return maps[0]
    return np.concatenate([one.reshape(len(one), -1) for one in maps], axis=1)


class Target(Protocol):
    """A kind of device with a runtime on it."""

    name: str
    formats: tuple[str, ...]
    """File suffixes, without the dot, that the target loads."""
    exporter: str
    """The exporter whose files suit it best."""
    floats: str
    """The precision that floats are computed in, unless a runner's ``precision`` says otherwise:
    ``float32``, ``float16``, or that the file says it."""

    def available(self) -> str | None:
        """None when the target can be used, else why not and how to mend it."""
        ...

    def runtime(self) -> str:
        """Name, version and float precision of the runtime, for the report."""
        ...

    def kernels(self, path: Path) -> dict[str, int]:
        """What the runtime makes of the file: each kernel that computes, and how many of it.

        Names are the runtime's own, with ``int8`` or ``float`` in front.
        """
        ...

    def load(self, path: Path, threads: int) -> Runner:
        """Load the artefact at ``path`` to run on ``threads`` threads.

        Raises:
            TargetMissingError: the runtime is not installed.
            UsageError: the file is not there or the runtime refuses it.
        """
        ...


_REGISTRY: dict[str, type[Target]] = {}
_T = TypeVar("_T", bound=type[Target])


def register_target(name: str) -> Callable[[_T], _T]:
    """Class decorator that makes a target known under ``name``.

    Raises:
        ValueError: another class already has the name.
    """

    def register(cls: _T) -> _T:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            message = f"target {name!r} is already registered by {known.__qualname__}"
            raise ValueError(message)
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def get_target(name: str) -> Target:
    """The target called ``name``, which may be one on another device (``remote/address.py``).

    Raises:
        UsageError: no target has that name; the nearest names are given.
        TargetMissingError: another package offers the target but it cannot be imported.
    """
    if name.startswith(("ssh:", "adb:")):
        from deploykit.targets.remote.target import remote_target

        return remote_target(name)
    if name not in _REGISTRY:
        if name in _own_names():
            importlib.import_module(f"{__package__}.{name.replace('-', '_')}")
        elif name in _offered():
            _load_entry_point(_offered()[name])
    try:
        cls = _REGISTRY[name]
    except KeyError:
        known = list_targets()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        message = f"unknown target {name!r}; did you mean: {', '.join(near)}"
        raise UsageError(message) from None
    return cls()


def list_targets() -> list[str]:
    """Names of all targets, sorted, whether or not their runtime is installed."""
    return sorted({*_REGISTRY, *_own_names(), *_offered()})


def _own_names() -> set[str]:
    """Targets of this package: the files whose first word is a kind of device."""
    package = importlib.import_module(__package__ or "deploykit.targets")
    files = (info.name for info in pkgutil.iter_modules(package.__path__))
    return {name.replace("_", "-") for name in files if name.split("_")[0] in _KINDS}


def _offered() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _load_entry_point(point: EntryPoint) -> None:
    try:
        cls = point.load()
    except Exception as error:  # a third party's import can fail in any way
        message = f"target {point.name!r} ({point.value}) cannot be imported: {one_line(error)}"
        raise TargetMissingError(message) from error
    _REGISTRY.setdefault(point.name, cls)
