"""Options that several commands share, and what they all do with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from deploykit.recipe import Recipe

__all__ = [
    "ImgSize",
    "Json",
    "Model",
    "NumClasses",
    "Out",
    "Overwrite",
    "RecipeFile",
    "Seed",
    "Set",
    "Weights",
    "listed",
    "print_json",
    "resolved",
]

Model = Annotated[str | None, typer.Option(help="Backbone name, module:factory, or an .onnx file.")]
Weights = Annotated[
    str | None,
    typer.Option(help="auto, hub, random, or a checkpoint file.", show_default="auto"),
]
NumClasses = Annotated[int | None, typer.Option(help="Classes of the head.")]
ImgSize = Annotated[int | None, typer.Option(help="Input side in pixels.")]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.")]
RecipeFile = Annotated[Path | None, typer.Option(help="Recipe file (YAML) to start from.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override: section.key=value.")]
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


def print_json(text: str) -> None:
    """JSON text as one line on standard output."""
    sys.stdout.write(json.dumps(json.loads(text), ensure_ascii=False) + "\n")
