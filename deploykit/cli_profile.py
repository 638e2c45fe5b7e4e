"""The ``profile`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from deploykit.cli_options import BatchSize, ImgSize, Json, Threads
from deploykit.json_output import print_json

__all__ = ["profile"]


def profile(
    source: Annotated[Path, typer.Argument(help="A model file, or a finished run's folder.")],
    target: Annotated[str, typer.Option(help="Where to run it.")] = "cpu-onnxruntime",
    against: Annotated[
        Path | None, typer.Option(help="The float file to compare a model file with.")
    ] = None,
    img_size: ImgSize = None,
    threads: Threads = 1,
    batch_size: BatchSize = 1,
    seconds: Annotated[
        float, typer.Option(min=0.01, help="Seconds of profiled calls of each file.")
    ] = 2.0,
    top: Annotated[int, typer.Option(min=1, help="Layers to show; the rest is summed.")] = 20,
    as_json: Json = False,
) -> int:
    """Show where a file's time goes, layer by layer, and what is slower quantised."""
    from deploykit.profile import profile_source
    from deploykit.profile_table import profile_table
    from deploykit.progress import Reporter, as_fractions

    with Reporter().step(f"profile on {target}", total=1.0) as advance:
        found, verdict = profile_source(
            source,
            target,
            against=against,
            size=img_size,
            threads=threads or 1,
            batch=batch_size or 1,
            seconds=seconds,
            progress=as_fractions(advance),
        )
    console = Console(stderr=as_json, highlight=False)
    shown = found[-1]
    console.print(Text(f"{shown.artifact} on {target}: {shown.total_ms:.3f} ms", style="bold"))
    console.print(profile_table(shown, found[0] if len(found) == 2 else None, top))
    for line in verdict:
        console.print(Text(line), soft_wrap=True)
    if as_json:
        files = [one.model_dump(mode="json") for one in found]
        print_json(json.dumps({"target": target, "files": files, "verdict": verdict}))
    return 0
