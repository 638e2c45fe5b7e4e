"""The ``split`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploykit.cli_options import (
    Calib,
    CalibImages,
    DataFolder,
    ImgSize,
    Json,
    MaxDrop,
    Model,
    NumClasses,
    Out,
    Overwrite,
    Prune,
    RecipeFile,
    Recover,
    RecoverMinutes,
    Resume,
    Seed,
    Set,
    Targets,
    Tokens,
    Weights,
    listed,
    resolved,
)
from deploykit.json_output import print_json

__all__ = ["split"]


def split(
    model: Model = None,
    parts: Annotated[int | None, typer.Option(min=2, help="How many sub-models.")] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Or: their classes, [[0, 3], [1, 2]] in a JSON file.")
    ] = None,
    bits: Annotated[str | None, typer.Option(help="4, 8, w4a8, w4a16 …, or none.")] = None,
    prune: Prune = None,
    tokens: Tokens = None,
    recover: Recover = None,
    recover_minutes: RecoverMinutes = None,
    weights: Weights = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    calib: Calib = None,
    calib_images: CalibImages = None,
    data: DataFolder = None,
    targets: Targets = None,
    max_drop: MaxDrop = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Split a backbone by classes into sub-models for several devices (ED-ViT)."""
    from deploykit.api import options_to_recipe
    from deploykit.errors import UsageError
    from deploykit.progress import Reporter
    from deploykit.report.split_page import print_split
    from deploykit.split import default_output, read_classes, run_split

    if (parts is None) == (classes is None):
        raise UsageError("give either --parts N or --classes FILE")
    asked = read_classes(classes) if classes is not None else parts
    assert asked is not None
    given = options_to_recipe(
        model=model,
        bits=None if bits == "none" else bits,
        algorithm="none" if bits == "none" else None,
        prune=prune,
        tokens=tokens,
        recover=recover,
        recover_minutes=recover_minutes,
        weights=weights,
        num_classes=num_classes,
        img_size=img_size,
        calib=calib,
        calib_images=calib_images,
        data=data,
        targets=listed(targets),
        max_drop=max_drop,
        seed=seed,
    )
    chosen = resolved(recipe, set_, given)
    out = out or default_output(chosen, asked if isinstance(asked, int) else len(asked))
    report = run_split(
        chosen,
        out,
        asked,
        command=shlex.join(["deploykit", *sys.argv[1:]]),
        reporter=Reporter(),
        resume=resume,
        overwrite=overwrite,
    )
    print_split(report, Console(stderr=as_json, highlight=False), out)
    if as_json:
        print_json(report.to_json())
    return report.exit_code
