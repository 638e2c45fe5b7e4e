"""The ``prune`` command; ``deploykit.cli`` adds it to the others."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from deploykit.cli_options import (
    BatchSize,
    Calib,
    CalibImages,
    DataFolder,
    Features,
    Formats,
    ImgSize,
    Json,
    MaxDrop,
    MaxLatency,
    Model,
    NumClasses,
    Out,
    Overwrite,
    RecipeFile,
    Recover,
    RecoverMinutes,
    Resume,
    Seed,
    Set,
    Sparsity,
    Targets,
    Threads,
    Tokens,
    Weights,
    carry_out,
    listed,
    resolved,
)

__all__ = ["prune"]


class Importance(StrEnum):
    """What a width is worth."""

    magnitude = "magnitude"
    taylor = "taylor"
    hessian = "hessian"
    dimap = "dimap"


class Budget(StrEnum):
    """What the ratio is a share of."""

    macs = "macs"
    parameters = "parameters"
    latency = "latency"


class Method(StrEnum):
    """Which weights become zero."""

    magnitude = "magnitude"
    wanda = "wanda"
    sparsegpt = "sparsegpt"
    distortion = "distortion"


def prune(
    model: Model = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of the budget to prune, such as 0.3.")
    ] = None,
    budget: Annotated[
        Budget | None, typer.Option(help="What it is a share of.", show_default="macs")
    ] = None,
    importance: Annotated[Importance | None, typer.Option(help="What a width is worth.")] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="mlp,heads,qk,v,conv,embedding.", show_default="mlp,heads,conv"),
    ] = None,
    blocks: Annotated[int | None, typer.Option(help="Whole blocks that go.")] = None,
    tokens: Tokens = None,
    sparsity: Sparsity = None,
    sparsity_method: Annotated[Method | None, typer.Option(help="Which weights go.")] = None,
    recover: Recover = None,
    recover_minutes: RecoverMinutes = None,
    weights: Weights = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    calib: Calib = None,
    calib_images: CalibImages = None,
    data: DataFolder = None,
    targets: Targets = None,
    formats: Formats = None,
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    features: Features = False,
    threads: Threads = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Prune, merge tokens, sparsify and recover a backbone, without quantising it."""
    from deploykit.api import options_to_recipe

    options = options_to_recipe(
        model=model,
        algorithm="none",
        prune=ratio,
        prune_budget=budget.value if budget else None,
        prune_importance=importance.value if importance else None,
        prune_scope=listed(scope),
        prune_blocks=blocks,
        tokens=tokens,
        sparsity=sparsity,
        sparsity_method=sparsity_method.value if sparsity_method else None,
        recover=recover,
        recover_minutes=recover_minutes,
        weights=weights,
        num_classes=num_classes,
        img_size=img_size,
        features=features or None,
        calib=calib,
        calib_images=calib_images,
        data=data,
        targets=listed(targets),
        formats=listed(formats),
        threads=threads,
        batch_size=batch_size,
        max_drop=max_drop,
        max_latency_ms=max_latency,
        seed=seed,
    )
    chosen = resolved(recipe, set_, options)
    return carry_out(chosen, out, resume=resume, overwrite=overwrite, as_json=as_json)
