"""The ``sweep`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploykit.cli_options import Json, Overwrite, Resume
from deploykit.errors import ExitCode
from deploykit.json_output import print_json

__all__ = ["sweep"]


def sweep(
    spec: Annotated[Path, typer.Argument(help="What to sweep (YAML).")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder.")] = Path("out/sweep"),
    engine: Annotated[str, typer.Option(help="Where trials run: local or ray.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, such as auto; one is started without.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at a time on this machine.")] = 1,
    storage: Annotated[
        str | None, typer.Option(help="Database URL.", show_default="SQLite in the output folder")
    ] = None,
    resume: Resume = False,
    retry_failed: Annotated[bool, typer.Option(help="With --resume: failed trials too.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Run many recipes and find those that no other beats (Optuna; on a cluster, Ray)."""
    from deploykit.errors import UsageError
    from deploykit.progress import Reporter
    from deploykit.report.sweep_page import print_sweep
    from deploykit.sweep.engines import Engine, LocalEngine, RayEngine
    from deploykit.sweep.run import run_sweep, sweep_threads
    from deploykit.sweep.spec import load_sweep

    if engine not in ("local", "ray"):
        raise UsageError(f"--engine: wanted local or ray, got {engine!r}")
    if ray_address is not None and engine != "ray":
        raise UsageError("--ray-address is for --engine ray")
    chosen = load_sweep(spec)
    threads = sweep_threads(chosen)
    runs: Engine = (
        RayEngine(ray_address, workers, threads)
        if engine == "ray"
        else LocalEngine(workers, threads)
    )
    try:
        report = run_sweep(
            chosen,
            out,
            engine=runs,
            command=shlex.join(["deploykit", *sys.argv[1:]]),
            reporter=Reporter(),
            storage=storage,
            resume=resume,
            overwrite=overwrite,
            retry_failed=retry_failed,
        )
    finally:
        runs.close()
    console = Console(stderr=as_json, highlight=False)
    print_sweep(report, console)
    console.print(f"report: {out / 'sweep.html'}", markup=False, soft_wrap=True)
    if as_json:
        print_json(report.to_json())
    if report.front:
        return ExitCode.OK
    # every trial failed: with the code they share, if they do
    codes = {trial.exit_code for trial in report.trials if trial.state == "failed"}
    return codes.pop() if len(codes) == 1 else ExitCode.UNEXPECTED
