"""``deploykit sensitivity``: which layers bear which widths, and a recipe that gives them these."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from deploykit.backbones.build import build_backbone
from deploykit.environment import version
from deploykit.errors import ExitCode, UsageError
from deploykit.fsio import atomic_write_text, ensure_directory
from deploykit.graph.capture import CapturedModel, capture
from deploykit.graph.quantized import FLOAT
from deploykit.images import Images, calibration_images
from deploykit.latency_table import (
    LatencyTable,
    dump_latency_table,
    load_latency_table,
    measure_latency_table,
)
from deploykit.progress import Reporter
from deploykit.quant.sensitivity import (
    FLOAT_BITS,
    LayerScores,
    Metric,
    measure_sensitivity,
)
from deploykit.quant.sensitivity_collapse import CollapsedLayer, find_collapse
from deploykit.quantize_options import quantize_options
from deploykit.recipe import Recipe, parse_bits, parse_layer_bits
from deploykit.recipe_io import dump_recipe
from deploykit.report.sensitivity_model import Budget, Collapse, LayerRow, SensitivityReport
from deploykit.report.sensitivity_page import render_page
from deploykit.sensitivity_budget import BudgetAsked, allocate_bits, weight_width
from deploykit.workspace import output_folder

__all__ = ["METRICS", "SensitivityOptions", "default_output", "parse_widths", "run_sensitivity"]

METRICS: dict[str, str] = {
    "kl": "KL divergence of the predictions when only this layer is quantised, nats",
    "sqnr": "noise over signal of the layer's own output",
    "fisher": "the layer's squared error weighted by squared gradients (diagonal Fisher), nats",
    "lrp": "share of the prediction's relevance times noise over signal of the layer's output",
}
_FILES = ("sensitivity.json", "sensitivity.html", "recipe.yaml", "latency.json")


@dataclass(frozen=True)
class SensitivityOptions:
    """What the recipe doesn't say.

    Attributes:
        bits: ``wNaM`` or ``float``, widest first (see ``parse_widths``).
        images: that ranges are read from and layers are scored on.
        latency_table: file of measured times; None has them measured if a budget needs them.
    """

    metric: Metric = "kl"
    bits: tuple[str, ...] = ("w8a8", "w6a6", "w4a4")
    images: int = 64
    budget: BudgetAsked | None = None
    latency_table: Path | None = None


def parse_widths(text: str) -> tuple[str, ...]:
    """``8,6,4``, ``8 w4a8`` or ``float,8`` as bits, widest first, each once.

    Raises:
        UsageError: one of them is no width.
    """
    try:
        found = {parse_layer_bits(part) for part in text.replace(",", " ").split()}
    except ValueError as error:
        raise UsageError(f"--bits {text}: {error}") from error
    if not found - {FLOAT_BITS}:
        raise UsageError(f"--bits {text}: wanted at least one width such as 8,6,4")
    return tuple(sorted(found, key=_widths, reverse=True))


def default_output(recipe: Recipe) -> Path:
    """``out/<model>-sensitivity`` in the working folder."""
    return output_folder(recipe.model.name, "sensitivity")


def run_sensitivity(
    recipe: Recipe,
    out: Path,
    options: SensitivityOptions,
    *,
    command: str,
    reporter: Reporter,
    overwrite: bool = False,
) -> SensitivityReport:
    """Score every layer, allocate bits if a budget is given, and write the files to ``out``.

    Written are sensitivity.json, sensitivity.html and recipe.yaml, which ``deploykit compress
    --recipe`` carries out; latency.json where times were measured. ``quantize.layer_bits`` of
    the recipe given is replaced.

    Raises:
        UsageError: bad input, or a budget that can't be kept; nothing is left in ``out`` then.
        DeploykitError: the model can't be captured or scored.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    _check_recipe(recipe)
    table = load_latency_table(options.latency_table) if options.latency_table else None
    backbone, notes = build_backbone(recipe.model, recipe.seed)
    images = calibration_images(recipe.calibration.data, backbone, options.images, recipe.seed)
    if recipe.calibration.data is None:
        notes = [*notes, "synthetic images: the scores are about noise; give --calib DIR"]
    for note in notes:
        reporter.note(note)
    if not backbone.weights.trained:
        reporter.note("UNTRAINED WEIGHTS: these scores are about random weights, not a model")
    with _output(out, overwrite=overwrite):
        with reporter.step("capture"):
            captured = capture(backbone)
        layers = _scores(captured, recipe, options, images, reporter)
        measured = None
        if options.budget is not None and options.budget.kind == "max-latency-ms" and not table:
            table = measured = measure_latency_table(
                captured, recipe, options.bits, images, reporter
            )
        chosen, budget = _allocate(captured, options, layers, table)
        base = _base(chosen, recipe, options)
        collapsed = [c for bits in _all_bits(layers) for c in find_collapse(layers, bits)]
        if budget is None:
            chosen = _rescued(layers, collapsed, base)
        layer_bits = _layer_bits(layers, chosen, base)
        report = SensitivityReport(
            deploykit_version=version(),
            command=command,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 1),
            model=backbone.name,
            weights=backbone.weights,
            metric=options.metric,
            metric_text=METRICS[options.metric],
            calibration=images.description,
            images=images.count,
            bits=_all_bits(layers),
            layers=[
                LayerRow(
                    layer=row.layer,
                    op=row.op,
                    weights=row.weights,
                    scores=row.scores,
                    sqnr_db=row.sqnr_db,
                    chosen=chosen.get(row.layer),
                )
                for row in layers
            ],
            collapse=[Collapse(**vars(one)) for one in collapsed],
            budget=budget,
            base_bits=base,
            layer_bits=layer_bits,
            warnings=notes,
            exit_code=ExitCode.UNTRAINED if backbone.weights.kind == "untrained" else ExitCode.OK,
        )
        _write(report, out, _recipe(recipe, base, layer_bits), measured, recipe)
    return report


def _check_recipe(recipe: Recipe) -> None:
    if recipe.model.gives_features:
        message = "sensitivity scores layers by what they do to classes; leave model.features out"
        raise UsageError(message)
    if recipe.quantize.algorithm != "deploykit":
        message = (
            f"quantize.algorithm is {recipe.quantize.algorithm}, but sensitivity scores "
            "deploykit's own quantisers; leave it out"
        )
        raise UsageError(message)
    if recipe.shrinks or recipe.recover.active:
        message = (
            "sensitivity scores a model as it is: run deploykit prune with this recipe first and "
            "give its output folder as --model, without prune, merge, sparsify and recover"
        )
        raise UsageError(message)


def _scores(
    captured: CapturedModel,
    recipe: Recipe,
    options: SensitivityOptions,
    images: Images,
    reporter: Reporter,
) -> list[LayerScores]:
    size = recipe.calibration.batch_size if captured.dynamic_batch else 1
    title = f"score each layer at {', '.join(options.bits)} on {images.count} images"
    passes = 2 + len(set(options.bits) - {FLOAT_BITS})
    with reporter.step(title, total=passes * images.count) as advance:
        layers = measure_sensitivity(
            captured,
            quantize_options(recipe.quantize),
            [_widths(bits) for bits in options.bits],
            lambda: images.batches(size),
            options.metric,
            seed=recipe.seed,
            progress=advance,
        )
    if not layers:
        raise UsageError(f"{captured.backbone.name} has no layer that can be quantised")
    return layers


def _widths(bits: str) -> tuple[int, int]:
    if bits == FLOAT_BITS:
        return FLOAT, FLOAT
    weights, _, activations = parse_bits(bits)[1:].partition("a")
    return int(weights), int(activations)


def _all_bits(layers: Sequence[LayerScores]) -> list[str]:
    return sorted({bits for row in layers for bits in row.scores}, key=_widths, reverse=True)


def _allocate(
    captured: CapturedModel,
    options: SensitivityOptions,
    layers: Sequence[LayerScores],
    table: LatencyTable | None,
) -> tuple[dict[str, str], Budget | None]:
    if options.budget is None:
        return {}, None
    return allocate_bits(options.budget, layers, captured.graph_module, table)


def _base(chosen: dict[str, str], recipe: Recipe, options: SensitivityOptions) -> str:
    """``quantize.bits``: what most layers chose; without an allocation, the recipe's if scored."""
    widths = [bits for bits in options.bits if bits != FLOAT_BITS]
    if chosen:
        taken = list(chosen.values())
        return max(widths, key=lambda bits: (taken.count(bits), weight_width(bits)))
    return recipe.quantize.bits if recipe.quantize.bits in widths else widths[0]


def _rescued(
    layers: Sequence[LayerScores], collapsed: Sequence[CollapsedLayer], base: str
) -> dict[str, str]:
    """Every layer at the base, but those that collapse there (and what reads the same norm)."""
    keep = {(one.layer, one.bits): one.keep for one in collapsed}
    groups = {
        row.group: keep[row.layer, row.takes[base]]
        for row in layers
        if (row.layer, row.takes[base]) in keep
    }
    return {row.layer: groups.get(row.group, row.takes[base]) for row in layers}


def _layer_bits(layers: Sequence[LayerScores], chosen: dict[str, str], base: str) -> dict[str, str]:
    """Exceptions from the base, as globs that match one layer's name each."""
    return {
        _literal(row.layer): chosen[row.layer]
        for row in layers
        if chosen[row.layer] != row.takes[base]
    }


def _literal(name: str) -> str:
    """A glob that matches just this name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _recipe(recipe: Recipe, base: str, layer_bits: dict[str, str]) -> Recipe:
    data = recipe.model_dump(mode="json")
    data["quantize"] |= {"bits": base, "layer_bits": layer_bits}
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"the recipe can't take these widths: {first['msg']}") from error


@contextlib.contextmanager
def _output(out: Path, *, overwrite: bool) -> Iterator[None]:
    """The output folder, there and ours; gone again if it was made here and nothing came of it.

    Raises:
        UsageError: it is a file, has other files in it, or can't be made.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out}: wanted a folder, got a file; choose another -o")
    created = not out.exists()
    if not created and any(out.iterdir()):
        if not overwrite:
            raise UsageError(f"output {out} isn't empty: use --overwrite or another -o")
        if any(path.name not in _FILES for path in out.iterdir()):
            message = f"output {out}: has files no run of this command made; choose another -o"
            raise UsageError(message)
    ensure_directory(out)
    try:
        yield
    except BaseException:
        if created:
            with contextlib.suppress(OSError):
                out.rmdir()  # only if it is still empty
        raise


def _write(
    report: SensitivityReport,
    out: Path,
    made: Recipe,
    measured: LatencyTable | None,
    recipe: Recipe,
) -> None:
    """All is rendered before the first file is written; sensitivity.json comes last."""
    files = {"recipe.yaml": dump_recipe(made), "sensitivity.html": render_page(report)}
    if measured is not None:
        facts = {
            "runtime": "onnxruntime",
            "model": report.model,
            "batch": recipe.measure.batch_size,
            "threads": recipe.measure.threads,
        }
        files["latency.json"] = dump_latency_table(measured, facts)
    files["sensitivity.json"] = report.to_json()
    for name in set(_FILES) - set(files):
        (out / name).unlink(missing_ok=True)  # an earlier run's
    for name, text in files.items():
        atomic_write_text(out / name, text)
