"""A target of ours on another device, run by a Python there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploykit.errors import DeploykitError, TargetMissingError, UsageError
from deploykit.targets.child import THREAD_VARIABLES, ask
from deploykit.targets.host import Guest
from deploykit.targets.isolated import SERVING, GuestRunner
from deploykit.targets.registry import FloatArray, Runner, Target, get_target
from deploykit.targets.remote.address import GRAMMAR, Address, is_remote, parse
from deploykit.targets.remote.native import NativeTarget, runner_for
from deploykit.targets.remote.on_device import OnDevice
from deploykit.targets.remote.probe import NEEDED
from deploykit.targets.remote.session import Session, session_on
from deploykit.targets.remote.wording import plain

__all__ = ["PythonTarget", "remote_target"]

_PROBE = "deploykit.targets.remote.probe"
_WORKER = "deploykit.targets.worker"
_PACKAGES = {
    "coreml": "coremltools",
    "executorch": "executorch",
    "litert": "ai-edge-litert",
    "ncnn": "ncnn",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
}
"""What pip installs for a runtime on a device, where nothing else is wanted."""


def remote_target(name: str) -> Target:
    """The target of a name such as ``ssh://pi@board/cpu-onnxruntime``.

    Raises:
        UsageError: the name can't be read, or the target on the device is unknown.
    """
    address, inner = parse(name)
    if not inner or is_remote(inner):
        message = f"{name}: it names a device but no target on it; wanted {GRAMMAR}"
        raise UsageError(message)
    target, runner = get_target(inner), runner_for(address, inner)
    if runner is not None:
        return NativeTarget(name, address, target, runner)
    return PythonTarget(name, address, target)


class PythonTarget(OnDevice):
    """``inner`` on the device at ``address``; the device is asked when it is first needed."""

    def __init__(self, name: str, address: Address, inner: Target) -> None:
        super().__init__(name, address, inner)
        self._inner = inner.name
        self._facts: dict[str, Any] | None = None

    def _reach(self) -> None:
        self._probe()

    def runtime(self) -> str:
        """The runtime on the device: name, version, float precision."""
        return str(self._known()["runtime"])

    def kernels(self, path: Path) -> dict[str, int]:
        """What the device's runtime makes of the file."""
        function = "deploykit.targets.isolated:ask_target_kernels"
        session = session_on(self._address)
        there = session.send(path)
        request = {
            "do": "call",
            "function": function,
            "arguments": {"target": self._inner, "path": there},
        }
        with (
            session.process(self._words(session, 1, SERVING)) as command,
            Guest(self.name, command) as guest,
        ):
            found = guest.ask_for("result", request, timeout=300.0)
        return {str(name): int(count) for name, count in found.items()}

    def load(self, path: Path, threads: int) -> Runner:
        """The file loaded on the device, on at most as many threads as it has cores.

        Raises:
            TargetMissingError: the device can't be reached, or something is missing there.
            UsageError: the file is not there, or the runtime refuses it.
            MeasurementError: the connection was lost.
        """
        if not path.exists():
            message = f"{path}: no such file"
            raise UsageError(message)
        threads = min(threads, len(self._known()["allowed"]))
        session = session_on(self._address)
        try:
            there = session.send(path)
            command, name = session.start(self._words(session, threads, SERVING))
            guest = Guest(self.name, command, threads)
            try:
                runner = GuestRunner(guest, self._inner, there, threads)
            except BaseException:
                session.stop(name)
                raise
        except DeploykitError as error:
            raise plain(error, session, {}) from error

        def run(images: FloatArray, /) -> FloatArray:
            try:
                return runner(images)
            except DeploykitError as error:
                raise plain(error, session, {there: str(path)}) from error

        return run

    def allowed_cores(self) -> list[int]:
        """Logical cores that a process on the device may run on."""
        return [int(core) for core in self._known()["allowed"]]

    def pick_cores(self, threads: int) -> list[int]:
        """The best ``threads`` of them now, by the device's own judgement."""
        return [int(core) for core in self._probe(threads)["picked"]]

    def ask(
        self,
        request: Mapping[str, Any],
        *,
        progress: Callable[[float, str], None] | None = None,
        silence_seconds: float,
    ) -> dict[str, Any]:
        """The answer of the measuring process on the device; the process has ended there.

        Raises:
            DeploykitError: as ``child.ask``; MeasurementError if the connection was lost.
        """
        session = session_on(self._address)
        names: dict[str, str] = {}
        try:
            files = [session.send(Path(path)) for path in request["artifacts"]]
            names.update(zip(files, request["artifacts"], strict=True))
            sent = {**request, "target": self._inner, "artifacts": files}
            words = self._words(session, int(request["threads"]), _WORKER)
            with session.process(words) as command:
                answer = ask(
                    sent, progress=progress, silence_seconds=silence_seconds, command=command
                )
        except DeploykitError as error:
            raise plain(error, session, names) from error
        if isinstance(answer.get("device"), dict):
            answer["device"]["target"] = self.name
        return answer

    def _known(self) -> dict[str, Any]:
        return self._probe() if self._facts is None else self._facts

    def _probe(self, threads: int = 1) -> dict[str, Any]:
        """What the device says of the target.

        Raises:
            TargetMissingError: Python, a package or the runtime is missing there.
            DeploykitError: as ``Session``.
        """
        session = session_on(self._address)
        words = self._words(session, threads, _PROBE, self._inner, str(threads))
        with session.process(words) as command:
            answer = self._answer(session, command)
        where, python = self._address.device, self._address.interpreter
        pip = f"on the device: {python} -m pip install"
        if answer["missing"]:
            wanted = dict.fromkeys([*NEEDED.values(), self._package or ""])
            missing = ", ".join(answer["missing"])
            message = f"{where}: {python} lacks {missing}; {pip} {' '.join(wanted).strip()}"
            raise TargetMissingError(message)
        if answer["reason"] is not None:
            hint = f"; {pip} {self._package}" if self._package else ""
            message = f"{where}: {str(answer['reason']).split('; pip install')[0]}{hint}"
            raise TargetMissingError(message)
        self._facts = answer
        return answer

    def _answer(self, session: Session, command: list[str]) -> dict[str, Any]:
        code, out, said = session.complete(command)
        where, python = self._address.device, self._address.interpreter
        last = (said.strip().splitlines() or [f"exit code {code}"])[-1].strip()[:300]
        if code in (126, 127):
            message = (
                f"{where}: no {python} there ({last}); install Python 3.10 or newer, or name one "
                "with ?python=/path"
            )
            raise TargetMissingError(message)
        try:
            found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
        except (IndexError, ValueError):
            message = f"{where}: {python} there cannot run the measuring program: {last}"
            raise TargetMissingError(message) from None
        return found

    @property
    def _package(self) -> str | None:
        return _PACKAGES.get(self._inner.rpartition("-")[2])

    def _words(self, session: Session, threads: int, module: str, *arguments: str) -> list[str]:
        variables = [f"{name}={threads}" for name in THREAD_VARIABLES]
        return ["env", *variables, self._address.interpreter, session.package(), module, *arguments]
