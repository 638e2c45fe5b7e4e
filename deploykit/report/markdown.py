"""The report as GitHub-flavoured Markdown, short enough for a pull request's comment."""

from __future__ import annotations

import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from deploykit.report import view, wording
from deploykit.report.layers import layer_tables
from deploykit.report.model import Report

__all__ = ["markdown_template", "render_markdown"]

_SPECIAL = re.compile(r"([\\`*|\[\]~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def render_markdown(report: Report) -> str:
    """A verdict, one table, and what a reviewer asks next."""
    return markdown_template("report.md.j2").render(
        report=report,
        verdict=view.verdict(report),
        icon={"good": "✅", "bad": "❌", "doubt": "⚠️"}[view.mood(report)],
        headline=view.headline(report),
        rows=view.rows(report),
        accuracies=report.accuracy if report.weights.trained else [],
        fidelity=view.fidelity(report),
        worst=view.worst_layers(report, 5),
        layer_tables=layer_tables(report, 8),
        missed=[row for row in report.parity if not row.passed],
        words=wording,
    )


def _escaped(value: object) -> Markup:
    """A text that Markdown and HTML both show as it is, on one line, mentioning nobody."""
    text = wording.clean(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _SPECIAL.sub(r"\\\1", text).replace("@", "@\N{ZERO WIDTH NON-JOINER}")
    return Markup(text.replace("://", ":&#47;/"))  # noqa: S704 # escaped in the lines above


@cache
def markdown_template(name: str) -> Template:
    """A Markdown page of this folder: what is put into it can't become markup."""
    environment = Environment(
        loader=PackageLoader("deploykit.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_escaped,
    )
    return environment.get_template(name)
