"""The ``sensitivity`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploykit.cli_options import (
    ImgSize,
    Json,
    Model,
    NumClasses,
    Out,
    Overwrite,
    RecipeFile,
    Seed,
    Set,
    Weights,
    resolved,
)
from deploykit.json_output import print_json

__all__ = ["sensitivity"]


class MetricName(StrEnum):
    """How a layer's loss is scored."""

    kl = "kl"
    sqnr = "sqnr"
    fisher = "fisher"
    lrp = "lrp"


class MethodName(StrEnum):
    """How bits are allocated."""

    ilp = "ilp"
    greedy = "greedy"


def sensitivity(
    model: Model = None,
    metric: Annotated[
        MetricName, typer.Option(help="How a layer's loss is scored.")
    ] = MetricName.kl,
    bits: Annotated[str, typer.Option(help="Widths to score: 8,w4a8 … or float.")] = "8,6,4",
    images: Annotated[int, typer.Option(min=1, help="Images to score on.")] = 64,
    avg_bits: Annotated[
        float | None, typer.Option(help="Budget: average bits of a weight.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="Budget: size of the file's tensors, such as 6MB.")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="Budget: sum of the layers' measured times.")
    ] = None,
    latency_table: Annotated[
        Path | None,
        typer.Option(help="Times {layer: {bits: ms}} (JSON); measured here if left out."),
    ] = None,
    method: Annotated[MethodName, typer.Option(help="How bits are allocated.")] = MethodName.ilp,
    weights: Weights = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    calib: Annotated[Path | None, typer.Option(help="Images to calibrate and score on.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Goes into the recipe only: scores need no labels.")
    ] = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    seed: Seed = None,
    out: Out = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Score how much each layer loses at each width, and allocate bits under a budget."""
    from deploykit.api import options_to_recipe
    from deploykit.progress import Reporter
    from deploykit.report.sensitivity_page import print_sensitivity
    from deploykit.sensitivity import (
        SensitivityOptions,
        default_output,
        parse_widths,
        run_sensitivity,
    )
    from deploykit.sensitivity_budget import budget_asked

    options = SensitivityOptions(
        metric=metric.value,
        bits=parse_widths(bits),
        images=images,
        budget=budget_asked(
            avg_bits=avg_bits,
            max_bytes=max_bytes,
            max_latency_ms=max_latency_ms,
            latency_table=latency_table,
            method=method.value,
        ),
        latency_table=latency_table,
    )
    given = options_to_recipe(
        model=model,
        weights=weights,
        num_classes=num_classes,
        img_size=img_size,
        calib=calib,
        data=data,
        seed=seed,
    )
    chosen = resolved(recipe, set_, given)
    out = out or default_output(chosen)
    report = run_sensitivity(
        chosen,
        out,
        options,
        command=shlex.join(["deploykit", *sys.argv[1:]]),
        reporter=Reporter(),
        overwrite=overwrite,
    )
    print_sensitivity(report, Console(stderr=as_json, highlight=False), out)
    if as_json:
        print_json(report.to_json())
    return report.exit_code
