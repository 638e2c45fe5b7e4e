"""What goes to a device, as archives whose checksum says whether it is there already."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

__all__ = ["companions", "pack", "package_files"]

_HERE = Path(__file__).parent


def companions(path: Path) -> list[tuple[str, Path]]:
    """An artefact's files, each with its name on the device: itself and what it reads."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        return [(str(Path(path.name, file.relative_to(path))), file) for file in found]
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    return [(file.name, file) for file in (path, *beside) if file.is_file()]


def package_files() -> list[tuple[str, Path]]:
    """The files of this package that a device's Python needs: no torch, no pydantic."""
    spec = importlib.util.find_spec("deploykit")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    top = Path(next(iter(spec.submodule_search_locations)))
    found = [("start.py", _HERE / "start.py")]
    for name in ("__init__.py", "errors.py", "runtimes.py"):
        found.append((f"deploykit/{name}", top / name))
    for folder, inside in ((_HERE.parent, "targets"), (_HERE, "targets/remote")):
        for file in sorted(folder.glob("*.py")):
            found.append((f"deploykit/{inside}/{file.name}", file))
    return found


def pack(files: Iterable[tuple[str, Path]], sink: IO[bytes]) -> str:
    """Write a tar archive of the files; its sha256. Equal files give equal bytes.

    Raises:
        OSError: a file can't be read.
    """
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, path in files:
            entry = tarfile.TarInfo(name)
            entry.size = path.stat().st_size
            entry.mode = 0o700 if os.access(path, os.X_OK) else 0o600
            with path.open("rb") as stream:
                archive.addfile(entry, stream)
    sink.seek(0)
    digest = hashlib.sha256()
    while chunk := sink.read(1 << 20):
        digest.update(chunk)
    sink.seek(0)
    return digest.hexdigest()
