"""Files are written whole or not at all, and a failure is one line."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from deploykit.errors import UsageError
from deploykit.fsio import atomic_write_bytes, atomic_write_text, ensure_directory


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    atomic_write_text(path, "é\n")
    atomic_write_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_files_can_be_shared(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        atomic_write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


def test_a_symlink_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    link = tmp_path / "report.json"
    link.symlink_to(victim)
    atomic_write_text(link, "new")
    assert victim.read_text() == "mine"
    assert not link.is_symlink()


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "No space left on device; free space or choose another -o"),
        (errno.EROFS, "Read-only file system; choose another -o"),
        (errno.EIO, "choose another -o"),
    ],
)
def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="cannot write") as caught:
        atomic_write_text(path, "new")
    assert hint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_write_text(tmp_path / "a", "new")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_folder_as_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file or directory"):
        atomic_write_text(tmp_path / "no" / "a", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        atomic_write_text(tmp_path / "folder", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_ensure_directory(tmp_path: Path) -> None:
    assert ensure_directory(tmp_path / "a" / "b").is_dir()
    ensure_directory(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot make folder"):
        ensure_directory(tmp_path / "file")
    with pytest.raises(UsageError, match="null"):
        ensure_directory(tmp_path / "a\0b")
