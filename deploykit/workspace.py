"""The output folder while a run is under way: what is done is kept, so --resume can go on.

Finished steps are files under ``OUT/.work``. Each is written whole or not at all. The folder is
removed when the run completes. A run that fails on its user's input leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploykit.errors import UsageError
from deploykit.fsio import atomic_write_bytes, atomic_write_text, ensure_directory, publish, remove
from deploykit.types import STAGES

__all__ = ["Workspace", "open_workspace", "output_folder"]

_FILES = (
    "report.json",
    "report.html",
    "report.md",
    "environment.json",
    "recipe.yaml",
    "structure.json",
    "split.json",
    "split.html",
)
_STEMS = ("model", "original", "nncf", *STAGES)  # of the files in any format
_OURS = (".work", "report.json", "recipe.yaml")
_STAMP = "run.json"


def output_folder(model: str, suffix: str) -> Path:
    """``out/<model>-<suffix>`` in the working folder, where the user names none."""
    stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in model)
    return Path("out") / f"{stem[-80:]}-{suffix}"


class Workspace:
    """An output folder and the steps of the present run that are already done."""

    def __init__(self, out: Path, resumed: bool, created: bool) -> None:
        self.out = out
        self.work = out / ".work"
        self.resumed = resumed
        self._created = created

    def cached(self, step: str, compute: Callable[[], Any]) -> Any:
        """The JSON result of a step: read if it is there, else computed and kept.

        Args:
            step: unique name.
            compute: returns JSON-able data.
        """
        # the name of a target on another device has characters that no file name may have
        path = self.work / f"{re.sub(r'[^A-Za-z0-9._-]', '_', step)}.json"
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        result = compute()
        atomic_write_text(path, json.dumps(result))
        return result

    def write(self, path: Path, data: bytes) -> None:
        """Write a file of the run, whole or not at all."""
        atomic_write_bytes(path, data)

    def fresh_folder(self, name: str) -> Path:
        """A new, empty folder for files that are not all there yet."""
        folder = self.work / name
        remove(folder)
        ensure_directory(folder)
        return folder

    def adopt(self, folder: Path) -> list[Path]:
        """Move everything in a folder into the output folder; the new paths."""
        moved = []
        for path in sorted(folder.iterdir()):
            place = self.out / path.name
            publish(path, place)
            moved.append(place)
        folder.rmdir()
        return moved

    def finish(self) -> None:
        """The run is complete: drop what only a resumed run would need."""
        shutil.rmtree(self.work, ignore_errors=True)

    def discard(self) -> None:
        """The run ends on its user's input: leave nothing that wasn't there before it."""
        if self.resumed:
            return
        shutil.rmtree(self.work, ignore_errors=True)
        if self._created:
            shutil.rmtree(self.out, ignore_errors=True)


def open_workspace(
    out: Path, recipe_text: str, version: str, *, resume: bool, overwrite: bool
) -> Workspace:
    """Make or reopen the output folder of a run.

    Raises:
        UsageError: the folder has files and neither ``resume`` nor ``overwrite`` is given; it
            isn't ours to overwrite; the interrupted run in it had another recipe; it can't be
            written.
    """
    if out.exists() and not out.is_dir():
        message = f"output {out}: wanted a folder, got a file; choose another -o"
        raise UsageError(message)
    key = hashlib.sha256(f"{version}\n{recipe_text}".encode()).hexdigest()
    stamp = out / ".work" / _STAMP
    created = not out.exists()
    occupied = not created and any(out.iterdir())
    resumed = False
    if occupied and resume:
        if not stamp.exists():
            message = f"output {out}: no interrupted run to resume; use --overwrite or another -o"
            raise UsageError(message)
        try:
            earlier = json.loads(stamp.read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            earlier = None
        if earlier != key:
            message = (
                f"output {out}: the interrupted run had another recipe or deploykit version; "
                "give the same options, or start over with --overwrite"
            )
            raise UsageError(message)
        resumed = True
    elif occupied and overwrite:
        if not any((out / name).exists() for name in _OURS):
            message = f"output {out}: has files no run of deploykit made; choose another -o"
            raise UsageError(message)
        # An old report beside a new model would describe another file.
        shutil.rmtree(out / ".work", ignore_errors=True)
        for name in _FILES:
            (out / name).unlink(missing_ok=True)
        for path in [path for path in out.iterdir() if path.name.split(".")[0] in _STEMS]:
            remove(path)
    elif occupied:
        message = f"output {out} isn't empty: use --overwrite, --resume or another -o"
        raise UsageError(message)
    workspace = Workspace(out, resumed, created)
    try:
        ensure_directory(workspace.work)
        if not resumed:
            atomic_write_text(stamp, json.dumps({"key": key}))
    except UsageError:
        workspace.discard()
        raise
    return workspace
