"""What CI measured, run by run: a file with one JSON object a line, which only grows.

Several jobs may write at once: each adds its line in one write, behind a file lock. A line that
was damaged all the same (a full disk, a bad merge) is named and skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from deploykit.errors import UsageError
from deploykit.report.gates import failed_gates
from deploykit.report.model import Report, strict_json
from deploykit.types import Accuracy, Data, GateResult

__all__ = ["HistoryEntry", "HistoryTime", "append_history", "history_entry", "read_history"]

_COMMIT_VARIABLES = ("GITHUB_SHA", "CI_COMMIT_SHA")
_LOCK_SECONDS = 60
_MAX_BYTES = 64_000_000
_PACKAGES = ("torch", "onnxruntime", "openvino")


class HistoryTime(Data):
    """Latency of the compressed file on one target."""

    target: str
    device: str
    runtime: str
    batch: int
    threads: int
    p50_ms: float
    ratio: float | None = Field(description="of the original's time")
    ratio_low: float | None
    ratio_high: float | None
    noisy: bool

    @property
    def machine(self) -> str:
        return f"{self.device}, {self.threads} threads"


class HistoryEntry(Data):
    """One judged run."""

    schema_version: Literal[1] = 1
    time: str = Field(description="UTC, ISO 8601")
    commit: str | None
    model: str
    bits: str
    recipe_sha256: str
    deploykit_version: str
    environment: dict[str, str]
    accuracy: Accuracy | None = Field(description="of the file; None on untrained weights")
    bytes: int | None
    times: list[HistoryTime]
    gates: list[GateResult]
    exit_code: int

    @property
    def top1(self) -> float | None:
        """Percent."""
        return self.accuracy.top1 if self.accuracy else None


def history_entry(report: Report, gates: Sequence[GateResult]) -> HistoryEntry:
    """What the history keeps of a report and its judgement."""
    accuracy = report.find_accuracy("compressed") if report.weights.trained else None
    compressed = report.find_artifact("compressed")
    failed = failed_gates(gates)
    recipe = json.dumps(report.recipe, sort_keys=True)
    packages = report.environment.get("packages", {})
    return HistoryEntry(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=_commit(),
        model=report.model,
        bits=report.bits,
        recipe_sha256=hashlib.sha256(recipe.encode()).hexdigest(),
        deploykit_version=report.deploykit_version,
        environment={
            **{k: str(report.environment[k]) for k in ("python", "os") if k in report.environment},
            **{name: str(packages[name]) for name in _PACKAGES if name in packages},
        },
        accuracy=accuracy,
        bytes=compressed.bytes if compressed else None,
        times=[
            HistoryTime(
                target=m.target,
                device=m.device.device,
                runtime=m.device.runtime,
                batch=m.batch,
                threads=m.device.threads,
                p50_ms=m.p50_ms,
                ratio=m.ratio,
                ratio_low=m.ratio_low,
                ratio_high=m.ratio_high,
                noisy=m.noisy,
            )
            for m in report.measurements
            if m.artifact == "compressed"
        ],
        gates=list(gates),
        exit_code=failed[0].exit_code if failed else 0,
    )


def append_history(path: Path, entry: HistoryEntry) -> None:
    """Add one line.

    Raises:
        UsageError: the file can't be written, or another job doesn't let go of it.
    """
    line = json.dumps(json.loads(strict_json(entry)), ensure_ascii=False) + "\n"
    try:
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                # after a line that was cut off, a new one: the damage stays that line's
                size = os.fstat(descriptor).st_size
                cut = size > 0 and _last_byte(descriptor, size) != b"\n"
                data = ("\n" if cut else "").encode() + line.encode()
                if os.write(descriptor, data) != len(data):
                    raise UsageError(f"history {path}: the disk is full; free space, check again")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except Timeout:
        message = f"history {path}: another job holds its lock for {_LOCK_SECONDS} s; try again"
        raise UsageError(message) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"history {path}: {reason}; choose another --history") from error


def _last_byte(descriptor: int, size: int) -> bytes:
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1)


def read_history(path: Path) -> tuple[list[HistoryEntry], list[str]]:
    """The runs in the order of the file, and a warning for each line that can't be read.

    Raises:
        UsageError: the file can't be read, or no line of it can.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UsageError(f"history {path}: wanted a file below 64 MB; start a new one")
        lines = path.read_bytes().splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"history {path}: {reason}; check the path") from error
    entries, warnings = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(HistoryEntry.model_validate(_parsed(line)))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            warnings.append(f"{path}:{number}: skipped: {where}: {first['msg']}")
        except (ValueError, RecursionError):
            warnings.append(f"{path}:{number}: skipped: not a whole line of JSON")
    if not entries:
        found = f"; {warnings[0]}" if warnings else ", got an empty file"
        raise UsageError(f"history {path}: wanted lines that check --history wrote{found}")
    return entries, warnings


def _parsed(line: bytes) -> Any:
    return json.loads(line.decode("utf-8"))


def _commit() -> str | None:
    """What CI says is built, or the checkout the command runs in."""
    for name in _COMMIT_VARIABLES:
        if os.environ.get(name):
            return os.environ[name]
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run(
            [git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
