"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from deploykit.errors import UsageError

__all__ = [
    "atomic_write_bytes",
    "atomic_write_text",
    "ensure_directory",
    "publish",
    "remove",
    "writing",
]

_MEND = {
    errno.ENOSPC: "free space or choose another -o",
    errno.EDQUOT: "free space or choose another -o",
    errno.ENAMETOOLONG: "choose a shorter -o",
}


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never half.

    The data goes to a temporary file in the same folder, is flushed to the disk, and takes the
    name in one step. On any failure, an interrupt included, the temporary file is removed and
    what was at ``path`` before is untouched.

    Raises:
        UsageError: The disk is full, the folder is missing or cannot be written.
    """
    path = Path(path)
    # Not tempfile: its files are private (0600), and a report is made to be shared.
    aside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with aside.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except (OSError, ValueError) as exc:
        raise _cannot("write", path, exc) from exc


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8, with ``\\n`` line ends everywhere; see ``atomic_write_bytes``."""
    atomic_write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def ensure_directory(path: Path | str) -> Path:
    """Make the folder, and the folders above it, if it is not there.

    Raises:
        UsageError: It cannot be made, or a file has its name.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as exc:
        raise _cannot("make folder", path, exc) from exc
    return path


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def publish(path: Path, place: Path) -> None:
    """Give a finished file or folder its name in one step, in place of what has it."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if place.is_dir():  # a folder can't be replaced in one step
        remove(place)
    path.replace(place)
    _flush_folder(place.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What a library can't write is the user's one line.

    Raises:
        UsageError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as exc:
        raise _cannot("write", path, exc) from exc


def _flush_folder(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system lets a folder be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot(action: str, path: Path, exc: OSError | ValueError) -> UsageError:
    reason = getattr(exc, "strerror", None) or str(exc)
    mend = _MEND.get(getattr(exc, "errno", None) or 0, "choose another -o")
    return UsageError(f"cannot {action} {path}: {reason}; {mend}")
