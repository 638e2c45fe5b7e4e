"""The report as one HTML file: no script, nothing fetched, readable on a phone and on paper."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from deploykit._recipe_yaml import dump_yaml
from deploykit.report import plots, view, wording
from deploykit.report.distributions import distribution_plots
from deploykit.report.facts import device_facts, parity_grid, timing_facts
from deploykit.report.gains import gains_plot
from deploykit.report.layers import layer_tables
from deploykit.report.model import Report
from deploykit.report.scatter import scatter_plot
from deploykit.report.steps import step_plots

__all__ = ["markup", "page_template", "render_html"]


def render_html(report: Report) -> str:
    """One self-contained page; every text in it is escaped."""
    pictures = [
        scatter_plot(report),
        gains_plot(report),
        plots.drop_plot(report),
        *distribution_plots(report),
        *step_plots(report),
    ]
    return page_template("report.html.j2").render(
        report=report,
        verdict=view.verdict(report),
        mood=view.mood(report),
        headline=view.headline(report),
        cards=view.cards(report),
        rows=view.rows(report),
        accuracies=report.accuracy if report.weights.trained else [],
        withheld=list(dict.fromkeys(m.withheld for m in report.measurements if m.withheld)),
        pictures=markup(pictures),
        layer_pictures=markup([plots.layer_plot(report), plots.worst_layers_plot(report)]),
        layers=view.worst_layers(report, len(report.layers)),
        parity=parity_grid(report.parity),
        fidelity=view.fidelity(report),
        devices=device_facts(report.measurements),
        timings=timing_facts(report.measurements),
        layer_tables=layer_tables(report),
        recipe=dump_yaml(report.recipe),
        environment=view.flatten(report.environment),
        flatten=view.flatten,
        words=wording,
    )


def markup(pictures: Iterable[plots.Plot | None]) -> list[tuple[Markup, str]]:
    """Pictures for a page: the only text that is not escaped, drawn here from cleaned names."""
    return [(Markup(p.svg), p.caption) for p in pictures if p]  # noqa: S704


def _without_control(value: object) -> object:
    return wording.clean_lines(value) if type(value) is str else value  # not Markup: it is done


@cache
def page_template(name: str) -> Template:
    """A page of this folder: everything put into it is escaped, names that are missing raise."""
    environment = Environment(
        loader=PackageLoader("deploykit.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_without_control,
    )
    return environment.get_template(name)
