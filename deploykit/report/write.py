"""The report's files in the output folder."""

from __future__ import annotations

import json
from pathlib import Path

from deploykit.fsio import atomic_write_text, ensure_directory
from deploykit.report.html import render_html
from deploykit.report.markdown import render_markdown
from deploykit.report.model import Report

__all__ = ["write_report"]


def write_report(report: Report, out_dir: Path | str) -> None:
    """Write report.json, report.md, report.html and environment.json, each whole or not at all.

    All are rendered before the first is written, and report.json comes last: where it is, the
    others are.

    Raises:
        UsageError: The folder cannot be made or written, or the disk is full.
    """
    text = report.to_json()
    environment = json.loads(text)["environment"]
    files = {
        "report.md": render_markdown(report),
        "report.html": render_html(report),
        "environment.json": json.dumps(environment, indent=2, ensure_ascii=False) + "\n",
        "report.json": text,
    }
    folder = ensure_directory(out_dir)
    for name, content in files.items():
        atomic_write_text(folder / name, content)
