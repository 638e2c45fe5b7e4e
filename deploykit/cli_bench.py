"""The ``bench`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploykit.cli_options import ImgSize, Json, Overwrite, Seed, Targets, listed
from deploykit.json_output import print_json

__all__ = ["bench"]


def bench(
    files: Annotated[list[Path], typer.Argument(help="Model files; the first is the reference.")],
    targets: Targets = None,
    batch: Annotated[str, typer.Option(help="Images a call, comma separated: 1,4,16.")] = "1",
    threads: Annotated[str, typer.Option(help="Threads, comma separated: 1,2.")] = "1",
    img_size: ImgSize = None,
    min_seconds: Annotated[float, typer.Option(help="Least time of a combination.")] = 3.0,
    max_seconds: Annotated[float, typer.Option(help="Most time of a combination.")] = 30.0,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")] = None,
    seed: Seed = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="JSON file for deploykit report.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Measure model files that you have, side by side, over batches and threads."""
    from deploykit.bench import run_bench
    from deploykit.bench_output import bench_csv, print_bench
    from deploykit.errors import UsageError
    from deploykit.fsio import atomic_write_text
    from deploykit.progress import Reporter

    for path in (out, csv):
        if path is not None and path.exists() and not overwrite:
            message = f"{path} is there already; choose another name, or give --overwrite"
            raise UsageError(message)
        if path is not None and not path.parent.is_dir():
            message = f"{path}: there is no folder {path.parent}; make it first"
            raise UsageError(message)
    report = run_bench(
        files,
        targets=listed(targets),
        batches=_numbers("--batch", batch),
        threads=_numbers("--threads", threads),
        img_size=img_size,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
        seed=seed or 0,
        command=shlex.join(["deploykit", *sys.argv[1:]]),
        steps=Reporter().step,
    )
    if out is not None:
        atomic_write_text(out, report.to_json())
    if csv is not None:
        atomic_write_text(csv, bench_csv(report))
    print_bench(report, Console(stderr=as_json, highlight=False))
    if as_json:
        print_json(report.to_json())
    return report.exit_code


def _numbers(option: str, text: str) -> list[int]:
    from deploykit.errors import UsageError

    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        message = f"{option} wants whole numbers with commas between, such as 1,4,16; got {text!r}"
        raise UsageError(message) from None
