"""A foreign ONNX file as a torch module: opened in a process of its own first, then here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from deploykit.errors import UsageError
from deploykit.onnx_import.graph import digest, read_graph, used_external_files
from deploykit.onnx_import.limits import Limits, check_file, check_model, parse, read_bytes
from deploykit.onnx_import.module import OnnxModule, build_module

__all__ = ["WORKER", "OnnxFile", "read_onnx"]

# -P: an onnx.py in the user's folder must not become the worker's onnx
WORKER = (sys.executable, "-P", "-m", "deploykit.onnx_import.worker")


@dataclass(frozen=True)
class OnnxFile:
    """A file that was read and compared with ONNX Runtime.

    Attributes:
        module: images float32 (N, 3, size, size) to logits float32 (N, classes); N is 1 where
            the file fixes it.
        size: side of the input in pixels.
        size_is_free: whether the file takes other sizes, too.
        sha256: of the file; of the file and then those beside it, if weights are there.
        sqnr_db: of the module against ONNX Runtime on the file, for random images.
    """

    module: OnnxModule
    size: int
    size_is_free: bool
    classes: int
    sha256: str
    sqnr_db: float


def read_onnx(
    path: Path,
    size: int | None = None,
    limits: Limits | None = None,
    command: Sequence[str] = WORKER,
) -> OnnxFile:
    """Read an ONNX file nobody vouches for.

    Args:
        size: wanted side of the input in pixels, where the file leaves it open.
        limits: None takes ``Limits.from_environment()``.

    Raises:
        UsageError: what is wrong with the file, in one line. A file that crashes a library or
            exceeds the limits does so in another process.
    """
    limits = limits or Limits.from_environment()
    check_file(path, limits)
    verdict = _ask(path, size, limits, command)
    data = read_bytes(path, limits)
    proto = parse(data, path)
    check_model(proto, path, limits)
    sha256 = digest(data, used_external_files(proto, path.parent))
    if sha256 != verdict["sha256"]:  # only what was examined is used here
        raise UsageError(f"--model {path}: the file changed while it was read")
    del data
    graph = read_graph(proto, path)
    del proto
    found, free = int(verdict["size"]), graph.size is None
    if size is not None and size != found:
        message = f"the file takes images of {found} pixels, but {size} were asked for"
        raise UsageError(f"--model {path}: {message}; leave img_size out")
    return OnnxFile(
        module=build_module(graph, path),
        size=found,
        size_is_free=free,
        classes=int(verdict["classes"]),
        sha256=sha256,
        sqnr_db=float(verdict["sqnr_db"]),
    )


def _ask(path: Path, size: int | None, limits: Limits, command: Sequence[str]) -> dict[str, Any]:
    request = {"path": str(path.absolute()), "size": size, "limits": asdict(limits)}
    with tempfile.TemporaryFile() as stderr:
        try:
            done = subprocess.run(
                list(command),
                input=json.dumps(request).encode(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                timeout=limits.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            message = f"examining it took more than {limits.seconds} s and was ended"
            raise UsageError(f"--model {path}: {message}") from error
        except OSError as error:
            raise UsageError(f"--model {path}: can't be examined ({error})") from error
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            reason = _obituary(done.returncode, stderr)
            message = f"--model {path}: examining it ended in a crash ({reason})"
            raise UsageError(message) from None
    if not isinstance(answer, dict):
        raise UsageError(f"--model {path}: examining it made no sense")
    if "refused" in answer:
        said = str(answer["refused"]).replace(str(path.absolute()), str(path))
        plain = "".join(c if c.isprintable() else " " for c in said)
        raise UsageError(" ".join(plain.split())[:500])
    return answer


def _obituary(code: int, stderr: IO[bytes]) -> str:
    if code < 0:
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
    stderr.seek(0)
    said = stderr.read()[-4000:].decode(errors="replace").strip().splitlines()
    return f"exit code {code}" + (f": {said[-1].strip()[:160]}" if said else "")
