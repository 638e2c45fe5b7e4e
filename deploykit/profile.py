"""Where the time of a file, or of a finished run's files, goes on a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploykit.artifacts import loadable
from deploykit.errors import UsageError
from deploykit.file_input import read_input
from deploykit.layer_profile import layer_profile
from deploykit.layer_verdict import verdict_lines
from deploykit.recheck import artifact_here
from deploykit.report.model import Report, load_report
from deploykit.targets.profiling.profile import ROUNDS, profile_files
from deploykit.targets.registry import get_target
from deploykit.types import LayerProfile

__all__ = ["ProfiledFile", "profile_source", "profiles_of"]

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class ProfiledFile:
    """A file to profile: what tables call it, its format, and where it is."""

    name: str
    format: str
    path: Path


def profiles_of(
    target: str,
    files: Sequence[ProfiledFile],
    *,
    size: int,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[LayerProfile]:
    """Profile files on a target in turns, as the report keeps them.

    Args:
        size: side of the square input, pixels.

    Raises:
        UsageError, TargetMissingError, MeasurementError: as ``profile_files``.
    """
    found = profile_files(
        target,
        [file.path for file in files],
        input_shape=(3, size, size),
        batch=batch,
        threads=threads,
        seconds=seconds,
        rounds=rounds,
        seed=seed,
        progress=progress,
    )
    return [
        layer_profile(file.name, file.format, target, one)
        for file, one in zip(files, found, strict=True)
    ]


def profile_source(
    source: Path,
    target: str,
    *,
    against: Path | None = None,
    size: int | None = None,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[list[LayerProfile], list[str]]:
    """Profile a file, or the compressed file of a finished run beside its original.

    Args:
        source: a file that the target loads, or a run's output folder.
        against: the float file to compare a file with.
        size: side of the input, pixels; None reads it from the file or the report.

    Returns:
        The profiles, the float file's first where there are two, and the verdict on the two.

    Raises:
        UsageError: the source isn't what is wanted, or the target doesn't load it.
        TargetMissingError: the target isn't there, or no profiler of it can be read.
        MeasurementError: the profile failed.
    """
    before: list[str] = []
    if source.is_dir() and not _is_file(source):
        if against is not None:
            raise UsageError("--against is for a single file; a run's folder has its own original")
        report = load_report(source)
        files = _of_run(report, source, target)
        size = size or report.preprocessing.size
        before = list(report.recipe.get("quantize", {}).get("float_layers", []))
    else:
        paths = [*([against] if against else []), source]
        files = [_file(path) for path in paths]
        size = size or _input_size(source)
    found = profiles_of(
        target, files, size=size, batch=batch, threads=threads, seconds=seconds, seed=seed,
        progress=progress,
    )  # fmt: skip
    return found, verdict_lines(found[0], found[1], before) if len(found) == 2 else []


def _of_run(report: Report, folder: Path, target: str) -> list[ProfiledFile]:
    """The original (or what it became before it was quantised) and the compressed file."""
    files = {a.name: a for a in loadable(report.artifacts, get_target(target))}
    if "compressed" not in files or "original" not in files:
        formats = ", ".join(sorted({a.format for a in report.artifacts}))
        message = f"{folder}: {target} loads none of its files ({formats}); see its report.json"
        raise UsageError(message)
    chosen = [artifact_here(files[name], folder) for name in ("original", "compressed")]
    return [ProfiledFile(a.name, a.format, a.path) for a in chosen]


def _file(path: Path) -> ProfiledFile:
    if not path.exists() or not _is_file(path):
        message = f"{path}: wanted a model file or a finished run's folder, got neither"
        raise UsageError(message)
    return ProfiledFile(path.name, path.suffix.lstrip("."), path)


def _is_file(path: Path) -> bool:
    """A model: a file, or a folder that is one (`.torch`)."""
    return path.is_file() or path.suffix == ".torch"


def _input_size(path: Path) -> int:
    """Side of the square input that a file names, pixels.

    Raises:
        UsageError: it names none.
    """
    channels, height, width = read_input(path).shape
    if channels not in (None, 3) or height is None or height != width:
        message = f"{path}: no side of a square input (N, 3, S, S) in it; give it with --img-size"
        raise UsageError(message)
    return height
