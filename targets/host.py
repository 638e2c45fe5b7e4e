"""Our side of a process in another environment: start it, ask it, and end it.

Whatever the process does (dies, falls silent, sends nonsense), the caller gets an answer or one
error of one line. It is asked one thing at a time; an answer may take ``timeout`` seconds.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from deploykit.errors import DeploykitError, MeasurementError, TargetMissingError, UsageError
from deploykit.targets.child import obituary
from deploykit.targets.environments import here, interpreter
from deploykit.targets.registry import FloatArray
from deploykit.targets.serving import pack, unpack

__all__ = ["Guest", "call", "guest_command"]

_PACKAGES = ("deploykit", "deploykit.targets", "deploykit.export")
_GRACE_SECONDS = 2.0
_MOST_BYTES = 2**31  # of one answer: more is nonsense
_ERRORS: dict[str, type[DeploykitError]] = {
    error.__name__: error for error in (MeasurementError, TargetMissingError, UsageError)
}
_Message = tuple[dict[str, Any], bytes]


def guest_command(environment: str, module: str) -> tuple[str, ...]:
    """The argument list that runs one of our modules with the environment's Python.

    Raises:
        TargetMissingError: the environment is not there.
    """
    python = interpreter(environment)
    if here(environment):
        return python, "-P", "-m", module
    folders = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        folders[name] = str(Path(next(iter(spec.submodule_search_locations))).absolute())
    script = str(Path(__file__).with_name("guest.py").absolute())
    return python, "-I", script, json.dumps(folders), str(_memory_limit()), module


def _memory_limit() -> int:
    """All of this machine's memory: a runaway should fail, not freeze the machine."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on this system
        return 0


class Guest:
    """A process in another environment.

    Args:
        who: what messages call it, such as ``executorch``.
        command: what to start, usually ``guest_command(…, "deploykit.targets.serving")``.
        threads: for the libraries that read it from ``OMP_NUM_THREADS``.

    Raises:
        DeploykitError: it cannot be started.
    """

    def __init__(self, who: str, command: Sequence[str], threads: int = 1) -> None:
        self._who = f"the process of {who}"
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        try:
            self._child = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        except OSError as error:
            self._stderr.close()
            message = f"cannot start {self._who}: {error}"
            raise DeploykitError(message) from error
        self._answers: queue.Queue[_Message | str | None] = queue.Queue()
        # a thread, because pipes have no timeout on all systems
        threading.Thread(
            target=_read, args=(self._child.stdout, self._answers), daemon=True
        ).start()
        self._end = weakref.finalize(self, _end, self._child, self._stderr)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._end()

    def ask(
        self, request: Mapping[str, Any], array: FloatArray | None = None, *, timeout: float
    ) -> tuple[dict[str, Any], FloatArray | None]:
        """Its answer. After an error that is not the process's own it is gone.

        Raises:
            UsageError, TargetMissingError, MeasurementError, DeploykitError: as the process says.
            DeploykitError: it is dead, silent for ``timeout`` seconds, or sent nonsense.
        """
        header, body = self.exchange(pack(request, array), timeout=timeout)
        if not body:
            return header, None
        try:
            return header, unpack(body)
        except Exception as error:  # any: the bytes may be anything
            self.close()
            message = f"{self._who} sent an array that cannot be read"
            raise DeploykitError(message) from error

    def exchange(self, message: bytes, *, timeout: float) -> _Message:
        """Its answer to a message of any form: a line of JSON and the bytes that it announces.

        Raises:
            DeploykitError: as ``ask``.
        """
        if not self._end.alive:
            raise DeploykitError(f"{self._who} has ended already")
        assert self._child.stdin is not None
        # written beside the waiting: a process that doesn't read would block us for ever
        threading.Thread(target=_write, args=(self._child.stdin, message), daemon=True).start()
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            answer = f"gave no answer for {timeout:g} s and was ended"
        except BaseException:  # an interrupt: its answer would be taken for the next request's
            self.close()
            raise
        if isinstance(answer, tuple):
            if "error" in answer[0]:
                kind = _ERRORS.get(str(answer[0]["error"]), DeploykitError)
                raise kind(str(answer[0].get("message")))
            return answer
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_GRACE_SECONDS)  # it may have closed its output and live on
            self._child.kill()
            last = obituary(self._child, self._stderr, self._who)
        else:
            last = f"{self._who} {answer}"
        self.close()
        raise DeploykitError(last)

    def ask_for(self, key: str, request: Mapping[str, Any], *, timeout: float) -> Any:
        """One value of its answer.

        Raises:
            DeploykitError: as ``ask``, and when the answer lacks the value.
        """
        header, _ = self.ask(request, timeout=timeout)
        if key not in header:
            self.close()
            message = f"{self._who} sent an answer without a {key}"
            raise DeploykitError(message)
        return header[key]


def call(environment: str, function: str, timeout: float, **arguments: Any) -> Any:
    """What ``module:function`` answers in a fresh process of the environment.

    Arguments and answer are plain JSON values.

    Raises:
        TargetMissingError: the environment is not there.
        DeploykitError: the function failed or the process died.
    """
    command = guest_command(environment, "deploykit.targets.serving")
    request = {"do": "call", "function": function, "arguments": arguments}
    with Guest(environment, command) as guest:
        return guest.ask_for("result", request, timeout=timeout)


def _write(pipe: IO[bytes], message: bytes) -> None:
    # if it died, reading its output says so with the reason
    with contextlib.suppress(OSError, ValueError):
        pipe.write(message)
        pipe.flush()


def _read(pipe: IO[bytes], answers: queue.Queue[_Message | str | None]) -> None:
    """Messages as they come; then a line that says what is wrong with one, or None at the end."""
    with contextlib.suppress(OSError, ValueError):  # closed by close()
        for line in pipe:
            try:
                header = json.loads(line)
                size = int(header.get("bytes", 0))
            except (ValueError, TypeError, AttributeError):
                answers.put(f"sent something unreadable: {line[:80]!r}")
                return
            if not 0 <= size <= _MOST_BYTES:
                answers.put(f"announced an answer of {size} bytes")
                return
            body = pipe.read(size)
            if len(body) == size:
                answers.put((header, body))
    answers.put(None)


def _end(child: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, stderr):
        # flushing what a dead process didn't read fails
        with contextlib.suppress(OSError, ValueError):
            if pipe is not None:
                pipe.close()
