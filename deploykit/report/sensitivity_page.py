"""The sensitivity report for people: one HTML page, and a table in the terminal."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploykit._recipe_yaml import dump_yaml
from deploykit.report import wording
from deploykit.report.html import page_template
from deploykit.report.plots import AFTER, BAD, BEFORE, INK, Plot, draw
from deploykit.report.sensitivity_model import LayerRow, SensitivityReport

__all__ = ["print_sensitivity", "render_page", "score_text"]

_SHOWN = 25  # layers in the picture
_MARKS = ((AFTER, "o"), (BEFORE, "s"), (BAD, "^"), (INK, "D"))


def render_page(report: SensitivityReport) -> str:
    """One self-contained page; every text in it is escaped."""
    picture = worst_plot(report)
    return page_template("sensitivity.html.j2").render(
        report=report,
        # The only text that is not escaped: markup drawn here, from cleaned names.
        picture=(Markup(picture.svg), picture.caption) if picture else None,  # noqa: S704
        recipe=dump_yaml({"quantize": {"bits": report.base_bits, "layer_bits": report.layer_bits}}),
        score=score_text,
        words=wording,
    )


def worst_plot(report: SensitivityReport) -> Plot | None:
    """The worst layers' scores, a mark a width; layers of no loss have no place on its scale."""
    shown = [row for row in report.worst(_SHOWN) if max(row.scores.values(), default=0) > 0]
    if not shown:
        return None

    def paint(axes: Axes) -> None:
        for index, bits in enumerate(bits for bits in report.bits if bits != "float"):
            points = [
                (row.scores[bits], place)
                for place, row in enumerate(shown)
                if row.scores.get(bits, 0) > 0
            ]
            colour, mark = _MARKS[index % len(_MARKS)]
            if points:
                axes.plot(*zip(*points, strict=True), mark, color=colour, label=bits)
        names = [wording.shorten(wording.clean(row.layer), 30) for row in shown]
        axes.set_yticks(range(len(shown)), names)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xscale("log")
        # The usual labels are formulas, and the house's pictures take $ for a $.
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(f"score ({report.metric}), log scale")
        axes.grid(axis="both")
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4, borderaxespad=0)

    caption = f"The {len(shown)} worst layers: each mark is the loss of that layer at those bits"
    return draw("sensitivity", caption, 1.0 + 0.2 * len(shown), paint)


def score_text(value: float | None) -> str:
    """A score with three digits, or a dash where the layer can't have these bits."""
    return "–" if value is None else "0" if value == 0 else f"{value:.3g}"


def print_sensitivity(report: SensitivityReport, console: Console, out: Path) -> None:
    """The ten worst layers, what to do about those that collapse, the budget, the files."""
    _say(console, f"{report.model}: {report.metric_text}", "bold")
    if not report.weights.trained:
        text = "! UNTRAINED WEIGHTS: these scores are about random weights, not about a model"
        _say(console, text, "bold red")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layer", overflow="fold")
    for bits in report.bits:
        table.add_column(bits, justify="right")
    table.add_column("in the recipe")
    for row in report.worst():
        cells = [wording.clean(row.layer), *(score_text(row.scores.get(b)) for b in report.bits)]
        table.add_row(*map(Text, [*cells, _chosen(row)]))
    console.print(table)
    for one in report.collapse:
        text = f"{one.layer} collapses at {one.bits}: {one.reason}; keep it at {one.keep}"
        _say(console, text, "yellow")
    if report.budget is not None:
        held = report.budget
        text = f"{held.kind} {held.limit:,.6g}: {held.spent:,.6g} by {held.method}"
        _say(console, f"{text}, sum of scores {score_text(held.score)}")
        if held.note:
            _say(console, held.note)
    for warning in report.warnings:
        _say(console, f"Warning: {warning}", "yellow")
    _say(console, f"report: {out / 'sensitivity.html'}")
    _say(console, f"next: deploykit compress --recipe {out / 'recipe.yaml'}")


def _chosen(row: LayerRow) -> str:
    return row.chosen or "–"


def _say(console: Console, text: str, style: str = "") -> None:
    text = wording.clean(text)
    if not console.encoding.lower().startswith("utf"):
        text = text.encode(console.encoding, errors="replace").decode(console.encoding)
    console.print(Text(text, style=style), soft_wrap=True)
