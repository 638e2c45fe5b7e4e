"""Options that several commands share, and what they all do with them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploykit.json_output import print_json

if TYPE_CHECKING:
    from deploykit.recipe import Recipe

__all__ = [
    "BatchSize",
    "Calib",
    "CalibImages",
    "DataFolder",
    "Features",
    "Formats",
    "ImgSize",
    "Insert",
    "Json",
    "MaxDrop",
    "MaxLatency",
    "Model",
    "NumClasses",
    "Out",
    "Overwrite",
    "Prune",
    "RecipeFile",
    "Recover",
    "RecoverMinutes",
    "Resume",
    "Seed",
    "Set",
    "Sparsity",
    "Targets",
    "Threads",
    "Tokens",
    "Weights",
    "carry_out",
    "listed",
    "resolved",
]

Model = Annotated[str | None, typer.Option(help="Backbone name, module:factory, or an .onnx file.")]
Weights = Annotated[
    str | None,
    typer.Option(help="auto, hub, random, or a checkpoint file.", show_default="auto"),
]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the head.")]
ImgSize = Annotated[int | None, typer.Option(help="Input side in pixels.")]
Insert = Annotated[
    str | None, typer.Option(help="New layers in the network: ela_b, ulsam, gmm, e2gc_16 …")
]
Features = Annotated[
    bool,
    typer.Option(
        "--features",
        help="Give feature maps, one a resolution, not scores; --set model.features=[2,5]: these.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.")]
RecipeFile = Annotated[Path | None, typer.Option(help="Recipe file (YAML) to start from.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override: section.key=value.")]
Prune = Annotated[
    float | None, typer.Option("--prune", help="Share of the multiply-adds to prune, such as 0.3.")
]
Tokens = Annotated[
    str | None, typer.Option(help="Tokens to merge in every block: 8, 8,8,0, fast or auto.")
]
Sparsity = Annotated[str | None, typer.Option(help="2:4 (or n:m), block16, block32, unstructured.")]
Recover = Annotated[
    Path | None, typer.Option(help="Images to train on, with the original as teacher.")
]
RecoverMinutes = Annotated[
    float | None, typer.Option(help="Minutes of that at most.", show_default="20")
]
Calib = Annotated[Path | None, typer.Option(help="Calibration images.")]
CalibImages = Annotated[int | None, typer.Option(help="How many of them.")]
DataFolder = Annotated[Path | None, typer.Option("--data", help="Labelled images for accuracy.")]
Targets = Annotated[
    str | None, typer.Option(help="Targets, comma separated: cpu-onnxruntime,cpu-openvino.")
]
Formats = Annotated[
    str | None, typer.Option(help="Further formats, comma separated: openvino,coreml.")
]
MaxDrop = Annotated[float | None, typer.Option(help="Points of top-1 that may go.")]
MaxLatency = Annotated[float | None, typer.Option(help="Limit of p50 in ms.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the latency runs.")]
BatchSize = Annotated[int | None, typer.Option(help="Batch of the latency runs.")]
Resume = Annotated[bool, typer.Option(help="Go on with an interrupted run.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Output folder.")]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier run's files.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, last.")]


def listed(text: str | None) -> list[str] | None:
    """The parts of a comma-separated option."""
    return None if text is None else [part.strip() for part in text.split(",")]


def resolved(recipe: Path | None, overrides: list[str] | None, options: dict[str, Any]) -> Recipe:
    """The recipe that a file, ``--set`` and the other options make together.

    Raises:
        UsageError: they don't make one.
    """
    from deploykit.recipe_io import apply_overrides, build_recipe, load_recipe

    if recipe is not None:
        return load_recipe(recipe, overrides or [], options)
    return build_recipe(apply_overrides(options, overrides or []))


def carry_out(
    recipe: Recipe, out: Path | None, *, resume: bool, overwrite: bool, as_json: bool
) -> int:
    """Run a recipe, show its report, and give its exit code."""
    from rich.console import Console

    from deploykit.pipeline import default_output, run
    from deploykit.progress import Reporter
    from deploykit.report.terminal import render_terminal

    out = out or default_output(recipe)
    report = run(
        recipe,
        out,
        command=shlex.join(["deploykit", *sys.argv[1:]]),
        reporter=Reporter(),
        resume=resume,
        overwrite=overwrite,
    )
    render_terminal(report, Console(stderr=as_json, highlight=False), out)
    if as_json:
        print_json(report.to_json())
    return report.exit_code
