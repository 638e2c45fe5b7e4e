"""The report as one HTML file: no script, nothing fetched, readable on a phone and on paper."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from deploykit._recipe_yaml import dump_yaml
from deploykit.report import plots, view, wording
from deploykit.report.layers import layer_tables
from deploykit.report.model import Report
from deploykit.report.steps import step_plots

__all__ = ["page_template", "render_html"]

VERDICTS = {
    "ok": "OK",
    "failed": "Failed",
    "not for deployment": "Not for deployment",
    "accuracy not measured": "Accuracy not measured",
}


def render_html(report: Report) -> str:
    """One self-contained page; every text in it is escaped."""
    pictures = [
        plots.drop_plot(report),
        plots.size_plot(report),
        *plots.latency_plots(report),
        *step_plots(report),
    ]
    return page_template("report.html.j2").render(
        report=report,
        verdict=VERDICTS[report.verdict],
        mood=view.mood(report),
        cards=view.cards(report),
        rows=view.rows(report),
        accuracies=report.accuracy if report.weights.trained else [],
        devices={m.target: m for m in report.measurements},
        withheld=list(dict.fromkeys(m.withheld for m in report.measurements if m.withheld)),
        # The only text that is not escaped: markup drawn here, from cleaned names.
        pictures=[(Markup(p.svg), p.caption) for p in pictures if p],  # noqa: S704
        layer_picture=_layer_picture(report),
        worst=view.worst_layers(report),
        layer_tables=layer_tables(report),
        recipe=dump_yaml(report.recipe),
        environment=view.flatten(report.environment),
        flatten=view.flatten,
        words=wording,
    )


def _layer_picture(report: Report) -> tuple[Markup, str] | None:
    plot = plots.layer_plot(report)
    return (Markup(plot.svg), plot.caption) if plot else None  # noqa: S704


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
