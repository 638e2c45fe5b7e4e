"""Ask the measuring process one question; whatever it does, answer or raise in one line."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from deploykit.errors import DeploykitError, MeasurementError, TargetMissingError, UsageError

__all__ = ["THREAD_VARIABLES", "WORKER", "ask", "obituary"]

# -P: a json.py in the user's folder must not become the worker's json
WORKER = (sys.executable, "-P", "-m", "deploykit.targets.worker")

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_ERRORS: dict[str, type[DeploykitError]] = {
    error.__name__: error for error in (MeasurementError, TargetMissingError, UsageError)
}


def ask(
    request: Mapping[str, Any],
    *,
    progress: Callable[[float, str], None] | None = None,
    silence_seconds: float,
    command: Sequence[str] = WORKER,
) -> dict[str, Any]:
    """The worker's result for ``request``. The process is gone when this returns or raises.

    Raises:
        UsageError, TargetMissingError, MeasurementError: as the worker says.
        MeasurementError: it died, was silent for ``silence_seconds``, or made no sense.
    """
    threads = str(request["threads"])
    environment = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, threads)}
    with tempfile.TemporaryFile() as stderr:
        try:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
            )
        except OSError as error:
            message = f"cannot start the measuring process: {error}"
            raise MeasurementError(message) from error
        try:
            _send(child, request)
            lines = _read_in_background(child)
            return _listen(child, lines, progress, silence_seconds, stderr)
        finally:  # also on KeyboardInterrupt
            child.kill()
            child.wait()


def _send(child: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    assert child.stdin is not None
    # if it died already, reading its output says so with the reason
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
        pipe.write(json.dumps(request).encode("ascii"))


def _read_in_background(child: subprocess.Popen[bytes]) -> queue.Queue[bytes | None]:
    """Lines as they come, then None. A thread, because pipes have no timeout on all systems."""
    lines: queue.Queue[bytes | None] = queue.Queue()
    stdout = child.stdout
    assert stdout is not None

    def read() -> None:
        with stdout:
            for line in stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _listen(
    child: subprocess.Popen[bytes],
    lines: queue.Queue[bytes | None],
    progress: Callable[[float, str], None] | None,
    silence_seconds: float,
    stderr: IO[bytes],
) -> dict[str, Any]:
    while True:
        try:
            line = lines.get(timeout=silence_seconds)
        except queue.Empty:
            message = f"the measuring process was silent for {silence_seconds:g} s and was ended"
            raise MeasurementError(message) from None
        if line is None:
            raise MeasurementError(obituary(child, stderr, "the measuring process"))
        event = _parse(line)
        kind = event.pop("event")
        if kind == "result":
            return event
        if kind == "error":
            error = _ERRORS.get(str(event.get("kind")), MeasurementError)
            raise error(str(event.get("message")))
        if kind == "progress" and progress is not None:
            progress(float(event.get("fraction", 0.0)), str(event.get("text", "")))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        message = f"the measuring process sent something unreadable: {line[:80]!r}"
        raise MeasurementError(message)
    return event


def obituary(child: subprocess.Popen[bytes], stderr: IO[bytes], who: str) -> str:
    """One line: how a process that is at its end died, and the last line it said."""
    code = child.wait()
    how = f"exit code {code}"
    if code < 0:
        try:
            how = signal.Signals(-code).name
        except ValueError:
            how = f"signal {-code}"
        if how == "SIGKILL":
            how += ", often for want of memory"
    stderr.seek(0)
    said = stderr.read()[-4000:].decode(errors="replace").strip().splitlines()
    last = f": {said[-1].strip()[:300]}" if said else ""
    return f"{who} died ({how}){last}"
