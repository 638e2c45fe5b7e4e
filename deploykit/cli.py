"""The command line. Nothing imports this module; it imports what a command needs, when it does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deploykit.cli_bench import bench
from deploykit.cli_check import check
from deploykit.cli_history import history
from deploykit.cli_options import (
    BatchSize,
    Calib,
    CalibImages,
    DataFolder,
    Features,
    Formats,
    ImgSize,
    Insert,
    Json,
    MaxDrop,
    MaxLatency,
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
    Sparsity,
    Targets,
    Threads,
    Tokens,
    Weights,
    carry_out,
    listed,
    resolved,
)
from deploykit.cli_profile import profile
from deploykit.cli_prune import prune
from deploykit.cli_report import report_
from deploykit.cli_sensitivity import sensitivity
from deploykit.cli_split import split
from deploykit.cli_sweep import sweep
from deploykit.errors import DeploykitError, ExitCode
from deploykit.json_output import print_json

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress vision backbones, export them, and measure the file that ships.",
    epilog=(
        "Exit codes: 0 ok, 1 unexpected, 2 bad input, 3 accuracy gate, 4 latency or size gate, "
        "5 parity, 6 target missing, 7 measurement invalid, 8 untrained weights, 130 interrupted."
    ),
)

ModelName = Annotated[
    str,
    typer.Argument(help="Backbone name, module:factory, or checkpoint path."),
]


@app.command()
def compress(
    model: Model = None,
    bits: Annotated[str | None, typer.Option(help="4, 8, w4a8, w4a16 …")] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="Who quantises: deploykit or nncf.", show_default="deploykit")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Others to quantise the same model, for the report: nncf.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="fast, balanced or best.")] = None,
    time_budget: Annotated[
        float | None, typer.Option(help="Seconds quantising should take at most.")
    ] = None,
    optimize_for: Annotated[
        str | None,
        typer.Option(help="Target: layers that are slower there quantised stay in float."),
    ] = None,
    weights: Weights = None,
    recipe: RecipeFile = None,
    set_: Set = None,
    calib: Calib = None,
    calib_images: CalibImages = None,
    data: DataFolder = None,
    targets: Targets = None,
    formats: Formats = None,
    prune: Prune = None,
    tokens: Tokens = None,
    sparsity: Sparsity = None,
    recover: Recover = None,
    recover_minutes: RecoverMinutes = None,
    max_drop: MaxDrop = None,
    max_latency: MaxLatency = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    features: Features = False,
    insert: Insert = None,
    threads: Threads = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> int:
    """Compress, export, verify and measure a backbone."""
    from deploykit.api import options_to_recipe

    if targets is None and recipe is None:
        targets = optimize_for
    options = options_to_recipe(
        model=model,
        bits=bits,
        algorithm=algorithm,
        compare=listed(compare),
        preset=preset,
        time_budget=time_budget,
        optimize_for=optimize_for,
        weights=weights,
        num_classes=num_classes,
        img_size=img_size,
        features=features or None,
        insert=insert,
        calib=calib,
        calib_images=calib_images,
        data=data,
        targets=listed(targets),
        formats=listed(formats),
        prune=prune,
        tokens=tokens,
        sparsity=sparsity,
        recover=recover,
        recover_minutes=recover_minutes,
        threads=threads,
        batch_size=batch_size,
        max_drop=max_drop,
        max_latency_ms=max_latency,
        seed=seed,
    )
    chosen = resolved(recipe, set_, options)
    return carry_out(chosen, out, resume=resume, overwrite=overwrite, as_json=as_json)


app.command()(prune)
app.command()(split)
app.command()(sensitivity)
app.command()(bench)
app.command()(profile)
app.command("report")(report_)
app.command()(sweep)
app.command()(check)
app.command()(history)


@app.command("list")
def list_(
    pattern: Annotated[str | None, typer.Argument(help="Part of a name, or a glob.")] = None,
    all_timm: Annotated[bool, typer.Option("--all", help="Every model of timm, too.")] = False,
    as_json: Json = False,
) -> int:
    """List the backbones."""
    from deploykit.backbones.registry import list_backbones
    from deploykit.tables import backbones_table

    found = list_backbones(pattern, all_timm=all_timm)
    if as_json:
        print_json(json.dumps([spec.model_dump(mode="json") for spec in found]))
    else:
        Console(highlight=False).print(backbones_table(found))
    return 0


@app.command()
def inspect(
    model: ModelName,
    weights: Weights = None,
    num_classes: NumClasses = None,
    img_size: ImgSize = None,
    features: Features = False,
    as_json: Json = False,
) -> int:
    """Show size, cost, operators, and what each technique can reach in a backbone."""
    from deploykit.backbones.resolve import holds_weights
    from deploykit.inspect import inspect_model
    from deploykit.recipe_io import build_recipe
    from deploykit.tables import print_inspection

    from deploykit.api import options_to_recipe  # isort: skip

    recipe = build_recipe(
        options_to_recipe(
            model=model,
            weights=weights or ("auto" if holds_weights(model) else "random"),
            num_classes=num_classes,
            img_size=img_size,
            features=features or None,
        )
    )
    found = inspect_model(recipe.model, recipe.seed)
    if as_json:
        print_json(found.model_dump_json())
    else:
        print_inspection(found, Console(highlight=False))
    return 0


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="Output folder of a finished run.")],
    targets: Annotated[
        str | None, typer.Option(help="Targets, comma separated.", show_default="all that can")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Images; synthetic without.")] = None,
    images: Annotated[int, typer.Option(min=2, help="How many of them.")] = 32,
    as_json: Json = False,
) -> int:
    """Compare a run's files with the graph saved beside them, once more, on this machine."""
    from deploykit.recheck import verify_folder
    from deploykit.tables import parity_table

    rows = verify_folder(folder, listed(targets), data, images)
    Console(stderr=as_json, highlight=False).print(parity_table(rows))
    if as_json:
        print_json(json.dumps([row.model_dump(mode="json") for row in rows]))
    return ExitCode.OK if all(row.passed for row in rows) else ExitCode.PARITY


@app.command()
def doctor(
    device: Annotated[
        str | None, typer.Option(help="Or on another device: ssh://user@host, adb:SERIAL.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Show which targets work here, and how to get the others."""
    if device is not None:
        from deploykit.device_check import check_device, device_table

        state, found = check_device(device)
        if as_json:
            targets = {name: reason or "ok" for name, reason in found.items()}
            print_json(json.dumps({"targets": targets, "device": state.as_json()}))
        else:
            Console(highlight=False).print(device_table(state, found))
        return 0
    from deploykit.environment import environment
    from deploykit.tables import doctor_table
    from deploykit.targets.registry import get_target, list_targets

    rows = [(name, get_target(name).available()) for name in list_targets()]
    if as_json:
        states = {name: reason or "ok" for name, reason in rows}
        print_json(json.dumps({"targets": states, "environment": environment()}))
    else:
        Console(highlight=False).print(doctor_table(rows, environment()))
    return 0


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``deploykit`` command: runs, prints errors as one line, and exits."""
    sys.exit(_main(argv))


def _main(argv: list[str] | None) -> int:
    command = typer.main.get_command(app)
    arguments = sys.argv[1:] if argv is None else argv
    try:
        result: Any = command.main(
            args=arguments or ["--help"], prog_name="deploykit", standalone_mode=False
        )
        if result == ExitCode.INTERRUPTED:  # typer takes Ctrl-C and says nothing
            raise KeyboardInterrupt
        return int(result or 0)
    except DeploykitError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        resumable = arguments[:1] in (["compress"], ["prune"], ["split"], ["sweep"])
        hint = "; run the same command with --resume to go on" if resumable else ""
        return _fail(f"interrupted{hint}", ExitCode.INTERRUPTED)
    except typer.TyperException as error:  # an unknown option, a missing argument
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        return _fail(f"{text} (see deploykit --help)", ExitCode.USAGE)
    except BrokenPipeError:
        return int(ExitCode.OK)


def _fail(message: str, code: ExitCode) -> int:
    sys.stderr.write(f"deploykit: error: {' '.join(message.split())}\n")
    return int(code)


if __name__ == "__main__":
    main()
