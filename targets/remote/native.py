"""A target on a device without Python, such as a phone: a native program runs the files there.

The user builds the program for the device and a runtime, once, and names it: ``?runner=/path``,
or for phones ``DEPLOYKIT_ANDROID_RUNNER_LITERT=/path`` (``_NCNN``, ``_EXECUTORCH`` and so on). We
send it, start it with the argument ``serve``, and talk to it over its standard input and output.
A request is one line; an answer is one line of JSON, followed by as many bytes as its ``bytes``
says, if it has that. Numbers are little-endian float32, without padding.

=========================  ====================================================================
request                    answer
=========================  ====================================================================
``describe``               ``{"runtime": "litert 2.1, float32", "machine": "aarch64"}``; what
                           the program was compiled for, as ``uname -m`` writes it
``load THREADS PATH``      ``{"model": 0, "load_ns": 1234}``; the path is the rest of the line
``input N C H W``          ``{}``; N*C*H*W numbers follow the request: the images to compute on
``run MODEL``              ``{"shape": [N, CLASSES], "bytes": 4*N*CLASSES}`` and the logits
``time MODEL``             ``{"ns": 1234}``: one call untimed, then one timed, nothing between
``memory``                 ``{"peak_rss_bytes": 1234}`` of the program so far
``kernels MODEL``          ``{"kernels": {"int8 Conv": 12}}``, or ``{"kernels": {}}`` if unknown
anything it can't do       ``{"error": "UsageError", "message": "one line"}``, and it goes on
=========================  ====================================================================

It ends when its input ends. ``tests/native_runner.c`` is a whole one, in standard C.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.targets.registry import FloatArray, Runner, Target
from deploykit.targets.remote.address import Address
from deploykit.targets.remote.facts import DeviceState, ask_device
from deploykit.targets.remote.on_device import OnDevice
from deploykit.targets.remote.program import Program
from deploykit.targets.remote.session import session_on

__all__ = ["NativeTarget", "runner_for"]

_RUN_SECONDS = 600.0
_ALSO_RUNS = {"aarch64": ("arm", "armv7l", "armv8l"), "x86_64": ("i386", "i686")}
_SPELLINGS = {"arm64": "aarch64", "amd64": "x86_64"}


def runner_for(address: Address, target: str) -> Path | None:
    """The native program to use for a target on a device, if the user named one."""
    runtime = target.rpartition("-")[2].upper()
    named = address.runner
    if named is None and address.kind == "adb":
        named = os.environ.get(f"DEPLOYKIT_ANDROID_RUNNER_{runtime}")
    return Path(named).expanduser() if named else None


class NativeTarget(OnDevice):
    """``inner``'s files on the device at ``address``, run by the program ``runner``."""

    def __init__(self, name: str, address: Address, inner: Target, runner: Path) -> None:
        super().__init__(name, address, inner)
        self._program = runner
        self._said: dict[str, Any] = {}
        self._first: DeviceState | None = None

    def _reach(self) -> None:
        self._describe()

    def runtime(self) -> str:
        """The runtime, as the program says."""
        return str((self._said or self._describe())["runtime"])

    def kernels(self, path: Path) -> dict[str, int]:
        """What the runtime makes of the file, where the program can say."""
        with self._serving(1) as program:
            return program.kernels(program.load(path, 1))

    def load(self, path: Path, threads: int) -> Runner:
        """The file loaded on the device, on at most as many threads as it has cores.

        Raises:
            DeploykitError: as ``Target.load``; MeasurementError if the connection was lost.
        """
        if not path.exists():
            raise UsageError(f"{path}: no such file")
        threads = min(threads, len(self.allowed_cores()))
        program = self._start(threads)
        try:
            model = program.load(path, threads)
        except BaseException:
            program.close()
            raise

        def run(images: FloatArray, /) -> FloatArray:
            program.give(images)
            return program.run(model)

        return run

    def allowed_cores(self) -> list[int]:
        """All cores of the device."""
        return [core.number for core in self._known().cores]

    def pick_cores(self, threads: int) -> list[int]:
        """The cores of the highest frequency."""
        return self._known().fastest(threads)

    def ask(
        self,
        request: Mapping[str, Any],
        *,
        progress: Callable[[float, str], None] | None = None,
        silence_seconds: float,
    ) -> dict[str, Any]:
        """What the measuring process answers, measured by the program on the device.

        Raises:
            MeasurementError: the program's processor is emulated on this device, the connection
                was lost, or the program died.
            DeploykitError: as the program says.
        """
        said, before = self._said or self._describe(), self._known()
        if not _runs_natively(str(said["machine"]), before.machine):
            message = (
                f"{self._address.device}: the runner is for {said['machine']}, the device is "
                f"{before.machine}: an emulator runs it, whose times mean nothing; its logits count"
            )
            raise MeasurementError(message)
        threads, cores = int(request["threads"]), [int(core) for core in request["cores"]]
        pinning: list[str] = []
        if before.pins:
            pinning = ["taskset", f"{sum(1 << core for core in cores):x}"]
        with self._serving(threads, pinning, silence_seconds) as program:
            rng = np.random.default_rng(request["seed"])
            shape = (request["batch"], *request["input_shape"])
            images = rng.standard_normal(shape, dtype=np.float32)
            files = [Path(path) for path in request["artifacts"]]
            if request["mode"] == "memory":
                return program.memory(files[0], threads, images)
            models = [program.load(path, threads) for path in files]
            program.give(images)
            before = self._state()  # temperatures now
            timed = program.timed(models, request, progress)
        device = {
            "target": self.name,
            "device": _described(self._address, before, self._state()),
            "cores": request["cores_available"],
            "threads": threads,
            "pinned_to": cores if before.pins else [],
            "isa": [],
            "governor": next((c.governor for c in before.cores if c.number in cores), None),
            "runtime": said["runtime"],
            "os": before.system,
        }
        return {"device": device, "measurements": timed}

    def _state(self) -> DeviceState:
        return ask_device(session_on(self._address))

    def _known(self) -> DeviceState:
        """What doesn't change while it is used."""
        if self._first is None:
            self._first = self._state()
        return self._first

    def _describe(self) -> dict[str, Any]:
        with self._serving(1) as program:
            said = program.say("describe")
        if not {"runtime", "machine"} <= set(said):
            raise TargetMissingError(
                f"{self._program}: it doesn't describe itself; is it a runner?"
            )
        return said

    @contextmanager
    def _serving(
        self, threads: int, before: Sequence[str] = (), seconds: float = _RUN_SECONDS
    ) -> Iterator[Program]:
        program = self._start(threads, before, seconds)
        try:
            yield program
        finally:
            program.close()

    def _start(
        self, threads: int, before: Sequence[str] = (), seconds: float = _RUN_SECONDS
    ) -> Program:
        if not os.access(self._program, os.X_OK) or self._program.is_dir():
            message = f"{self._program}: no program; the runner for {self.name} was named so"
            raise TargetMissingError(message)
        session = session_on(self._address)
        words = [*before, session.send(self._program), "serve"]
        return Program(session, words, threads, self.name, seconds)


def _runs_natively(program: str, device: str) -> bool:
    program, device = (_SPELLINGS.get(name, name) for name in (program, device))
    return program == device or program in _ALSO_RUNS.get(device, ())


def _described(address: Address, before: DeviceState, after: DeviceState) -> str:
    parts = [before.model or address.device, before.machine, f"{len(before.cores)} logical cores"]
    if before.zones and after.zones:
        hot = [max(state.zones.values()) for state in (before, after)]
        parts.append(f"hottest zone {hot[0]:.0f} °C before, {hot[1]:.0f} °C after")
    if after.throttling not in (None, "", "0"):
        parts.append(f"throttled (status {after.throttling})")
    return ", ".join(parts)
