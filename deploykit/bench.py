"""Files that the user has, whoever made them, measured side by side.

The first file is the reference. For each target, number of threads and batch, the files that the
target loads are timed in turns by ``measure``, and each is compared with the first of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from deploykit.artifacts import chosen_targets, size_and_hash
from deploykit.environment import environment, version
from deploykit.errors import ExitCode, MeasurementError, UsageError
from deploykit.file_input import FileInput, read_input
from deploykit.progress import Steps
from deploykit.targets.device import allowed_cores
from deploykit.targets.measure import measure
from deploykit.targets.registry import Target, get_target, list_targets
from deploykit.types import Data, Measurement

__all__ = ["BenchFile", "BenchReport", "BenchRow", "load_bench", "run_bench"]

_BESIDE = {".xml": ".bin", ".json": ".safetensors"}
_UNSAID = "as the file says"


class BenchFile(Data):
    """A file that was measured."""

    name: str
    path: Path
    bytes: int = Field(description="with the weights beside it")
    sha256: str
    precision: str = Field(description="as its maker wrote it into it")


class BenchRow(Data):
    """One file on one target, with one number of threads, at one batch."""

    measurement: Measurement
    reference: str = Field(description="the file its ratio refers to")
    images_per_s: float = Field(description="batch / p50: one call after another")


class BenchGap(Data):
    """What was asked for and couldn't be measured."""

    target: str
    threads: int
    batch: int
    files: list[str]
    reason: str


class BenchReport(Data):
    """Everything one ``deploykit bench`` found out."""

    kind: Literal["bench"] = "bench"
    schema_version: Literal[1] = 1
    deploykit_version: str
    command: str
    started: str = Field(description="UTC, ISO 8601")
    seconds: float
    seed: int
    input_shape: tuple[int, int, int]
    files: list[BenchFile] = Field(description="the first is the reference")
    rows: list[BenchRow]
    gaps: list[BenchGap] = Field(default=[], description="what couldn't be measured")
    environment: dict[str, Any]
    exit_code: int = 0

    def to_json(self) -> str:
        """Strict JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


def run_bench(
    files: Sequence[Path],
    *,
    targets: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (1,),
    img_size: int | None = None,
    min_seconds: float = 3.0,
    max_seconds: float = 30.0,
    seed: int = 0,
    command: str = "",
    steps: Steps,
) -> BenchReport:
    """Measure ``files``, the reference first.

    Args:
        targets: what runs them; all usable here that load the first file, if None.
        batches: images a call, one measurement each.
        threads: the same for threads.
        img_size: side in pixels, for files that don't say it.
        min_seconds: of the timed phase of one combination, all its files together.
        max_seconds: the same, at most.

    Returns:
        The report. Its ``exit_code`` is 7 if something was noisy or couldn't be measured.

    Raises:
        UsageError: a file is missing, refused or takes other images; a batch that a file can't
            take; more threads than cores; a file that no target loads.
        TargetMissingError: a target that was named isn't there.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    _check_counts(batches, threads)
    inputs = {path: read_input(path) for path in files}
    if len(inputs) != len(files):
        raise UsageError("a file was given twice; give each once")
    shape = _common_shape(inputs, img_size)
    _check_batches(inputs, batches)
    chosen = chosen_targets(targets) if targets else _targets_for(files[0])
    _check_loadable(files, chosen)
    names = _names(files)
    rows: list[BenchRow] = []
    gaps: list[BenchGap] = []
    for target in chosen:
        mine = [path for path in files if _loads(target, path)]
        artifacts = [(names[p], p, inputs[p].precision or _UNSAID) for p in mine]
        for count in threads:
            for batch in batches:
                title = f"{target.name}, {count} threads, batch {batch}"
                try:
                    with steps(title, 1.0) as advance:
                        found = measure(
                            target.name,
                            artifacts,
                            batch=batch,
                            input_shape=shape,
                            threads=count,
                            min_seconds=min_seconds,
                            max_seconds=max_seconds,
                            seed=seed,
                            progress=_Growing(advance),
                        )
                except MeasurementError as error:  # out of memory, say: the others are still good
                    gaps.append(
                        BenchGap(
                            target=target.name, threads=count, batch=batch,
                            files=[names[p] for p in mine], reason=str(error),
                        )
                    )  # fmt: skip
                    continue
                formats = {names[p]: p.suffix.lstrip(".") for p in mine}
                rows += [_row(one, found[0].artifact, formats) for one in found]
    noisy = any(row.measurement.noisy for row in rows)
    return BenchReport(
        deploykit_version=version(),
        command=command,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - clock, 1),
        seed=seed,
        input_shape=shape,
        files=[_describe(path, names[path], inputs[path]) for path in files],
        rows=rows,
        gaps=gaps,
        environment=environment(),
        exit_code=ExitCode.MEASUREMENT if noisy or gaps else ExitCode.OK,
    )


def load_bench(path: Path) -> BenchReport | None:
    """The report at ``path``, or None if that is no report of ``deploykit bench``.

    Raises:
        UsageError: it says that it is one, and isn't.
    """
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("kind") != "bench":
        return None
    try:
        return BenchReport.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        message = f"{path}: not a valid bench report: {where}: {first['msg']}"
        raise UsageError(message) from error


class _Growing:
    """From the share that is done to how much more is done."""

    def __init__(self, advance: Any) -> None:
        self._advance, self._seen = advance, 0.0

    def __call__(self, fraction: float, _text: str) -> None:
        self._advance(max(fraction - self._seen, 0.0))
        self._seen = max(fraction, self._seen)


def _row(one: Measurement, reference: str, formats: dict[str, str]) -> BenchRow:
    return BenchRow(
        measurement=one.model_copy(update={"format": formats[one.artifact]}),
        reference=reference,
        images_per_s=1e3 * one.batch / one.p50_ms,
    )


def _describe(path: Path, name: str, said: FileInput) -> BenchFile:
    beside = path.with_suffix(_BESIDE[path.suffix]) if path.suffix in _BESIDE else None
    if path.suffix == ".json":
        beside = path.with_name("model.safetensors")
    if path.suffix == ".onnx":
        beside = path.with_name(f"{path.name}.data")
    parts = [path] if beside is None or not beside.exists() else [path, beside]
    return BenchFile.model_validate(
        {"name": name, "path": path, "precision": said.precision or _UNSAID, **size_and_hash(parts)}
    )


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """File names where those differ, else paths."""
    short = [path.name for path in files]
    return {path: path.name if short.count(path.name) == 1 else str(path) for path in files}


def _loads(target: Target, path: Path) -> bool:
    return path.suffix.lstrip(".") in target.formats


def _targets_for(path: Path) -> list[Target]:
    able = [one for one in map(get_target, list_targets()) if _loads(one, path)]
    usable = [one for one in able if one.available() is None]
    if able and not usable:
        return chosen_targets([able[0].name])  # says what is missing
    return usable


def _check_loadable(files: Sequence[Path], targets: Sequence[Target]) -> None:
    for path in files:
        if not any(_loads(target, path) for target in targets):
            able = [one.name for one in map(get_target, list_targets()) if _loads(one, path)]
            named = ", ".join(one.name for one in targets) or "no target"
            hint = f"give --targets {','.join(able)}" if able else "no target knows its suffix"
            message = f"{path}: {named} can't load it; {hint}"
            raise UsageError(message)


def _check_counts(batches: Sequence[int], threads: Sequence[int]) -> None:
    cores = len(allowed_cores())
    if not batches or not threads or min(*batches, *threads) < 1:
        raise UsageError("--batch and --threads want numbers of 1 or more")
    if max(threads) > cores:
        message = f"{max(threads)} threads wanted, but this process may run on {cores} cores"
        raise UsageError(message)


def _check_batches(inputs: dict[Path, FileInput], batches: Sequence[int]) -> None:
    for path, said in inputs.items():
        wrong = [batch for batch in batches if said.batch not in (None, batch)]
        if wrong:
            message = (
                f"{path}: its batch is fixed at {said.batch}, so --batch {wrong[0]} can't be run; "
                f"give --batch {said.batch}, or export it with an open batch"
            )
            raise UsageError(message)


def _common_shape(inputs: dict[Path, FileInput], img_size: int | None) -> tuple[int, int, int]:
    given = (3, img_size, img_size) if img_size is not None else (None, None, None)
    shape: list[int | None] = [None, None, None]
    said_by: list[object] = ["", "", ""]
    for place, sizes in [*((p, i.shape) for p, i in inputs.items()), ("--img-size", given)]:
        for axis, size in enumerate(sizes):
            if size is None:
                continue
            if shape[axis] not in (None, size):
                what = ("channels", "height", "width")[axis]
                message = (
                    f"{said_by[axis]} wants {what} {shape[axis]} and {place} {size}; "
                    "measure files for the same images, without --img-size where they say it"
                )
                raise UsageError(message)
            shape[axis], said_by[axis] = size, place
    channels, height, width = shape
    if height is None or width is None:
        message = f"{next(iter(inputs))}: it doesn't say its input's size; give --img-size"
        raise UsageError(message)
    return channels or 3, height, width
