"""The process in another environment: ``python guest.py … deploykit.targets.serving``.

It answers requests on standard input, one at a time, until that is closed. A message is one line
of JSON; if it says ``"bytes": n``, the ``n`` bytes of a ``.npy`` file follow it. What libraries
print goes to standard error. An error is answered in one line, and the process stays.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

from deploykit.errors import DeploykitError, one_line
from deploykit.targets.answering import end_with, private_stdout
from deploykit.targets.registry import FloatArray, Runner, get_target, joined

__all__ = ["main", "pack", "unpack"]


def pack(header: Mapping[str, Any], array: FloatArray | None = None) -> bytes:
    """A message as bytes."""
    if array is None:
        return json.dumps(header).encode("ascii") + b"\n"
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    body = file.getvalue()
    return json.dumps({**header, "bytes": len(body)}).encode("ascii") + b"\n" + body


def unpack(body: bytes) -> FloatArray:
    """The array in a ``.npy`` file.

    Raises:
        ValueError: it is none, or holds Python objects.
    """
    return np.asarray(np.load(io.BytesIO(body), allow_pickle=False), dtype=np.float32)


def main() -> int:
    """Answer until standard input ends."""
    source, sink = sys.stdin.buffer, private_stdout()
    runners: list[Runner] = []
    while line := source.readline():
        request = json.loads(line)
        body = source.read(int(request.get("bytes", 0)))
        try:
            header, array = _answer(request, body, runners)
        except DeploykitError as error:
            header, array = {"error": type(error).__name__, "message": one_line(error)}, None
        except Exception as error:  # a library's: any type
            text = f"{type(error).__name__}: {one_line(error)}"
            header, array = {"error": "DeploykitError", "message": text}, None
        _send(sink, pack(header, array))
    return 0


def _send(sink: BinaryIO, message: bytes) -> None:
    sink.write(message)
    sink.flush()


def _answer(
    request: Mapping[str, Any], body: bytes, runners: list[Runner]
) -> tuple[dict[str, Any], FloatArray | None]:
    """What to do: ``load`` a file with a target, ``run`` a loaded one, or ``call`` a function."""
    what = request["do"]
    if what == "load":
        from pathlib import Path

        target = get_target(request["target"])
        runners.append(target.load(Path(request["path"]), request["threads"]))
        return {"runner": len(runners) - 1}, None
    if what == "run":
        return {}, joined(runners[request["runner"]](unpack(body)))
    module, _, path = request["function"].partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), path)
    return {"result": function(**request["arguments"])}, None


if __name__ == "__main__":
    end_with(main)
