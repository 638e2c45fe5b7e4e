"""What every measuring process does: answer requests on a private channel, and end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NoReturn

from deploykit.errors import DeploykitError, MeasurementError, one_line

__all__ = ["Emit", "answer_request", "end_with", "private_stdout"]

Emit = Callable[[Mapping[str, Any]], None]
"""Sends an event."""


def private_stdout() -> BinaryIO:
    """Standard output, kept for answers: native libraries print there, now to standard error."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def answer_request(answer: Callable[[Any, Emit], Mapping[str, Any]]) -> int:
    """Read one request (JSON) from standard input and send events, one JSON object a line.

    Args:
        answer: called with the request and with what sends events of its own (``progress``). What
            it returns is sent as ``result``; an error of ours, or want of memory, as ``error``.

    Returns:
        The exit code 0: an answer was sent.
    """
    events = private_stdout()

    def emit(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event).encode("ascii") + b"\n")
        events.flush()

    try:
        emit({"event": "result", **answer(json.loads(sys.stdin.buffer.read()), emit)})
    except DeploykitError as error:
        emit({"event": "error", "kind": type(error).__name__, "message": str(error)})
    except MemoryError:
        emit({"event": "error", "kind": "MeasurementError", "message": "out of memory"})
    return 0


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a measuring process's ``main`` and exit with its code; an error is one line."""
    try:
        code = main()
    except (BrokenPipeError, KeyboardInterrupt):  # whoever asked is gone
        code = 1
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {one_line(error)}\n")
        code = MeasurementError.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # some runtimes hang or crash in their global destructors
