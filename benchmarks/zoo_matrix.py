"""The results of ``benchmarks/zoo.py`` as a table, with a reason for every hole in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploykit.backbones.registry import BackboneSpec

__all__ = ["markdown"]

_COLUMNS = {
    "capture": "captured",
    "fp32": "ONNX fp32",
    "w8a8": "ONNX W8A8",
    "w4a4": "ONNX W4A4",
    "prune": "pruned 30 %",
    "merge": "tokens merged",
    "latency": "p50 ms, fp32 → W8A8",
}


def markdown(data: Mapping[str, Any], members: Mapping[str, BackboneSpec]) -> str:
    """The support matrix: a row for each family, run or not; ``members`` by family."""
    rows = data["members"]
    where = data.get("environment", {})
    cpu = f"{where['cpu']}, {where['cores_allowed']} cores" if where else "nothing was run yet"
    done = sum(1 for family in members if family in rows)
    lines = [
        "# Support matrix",
        "",
        f"Made by `python benchmarks/zoo.py` ({cpu}); {done} of {len(members)} families were run. "
        "The smallest member of each, **untrained**: that a cell is filled says that the network "
        "can be captured, compressed, exported and run by ONNX Runtime with the same answers as "
        "its graph at batches of 1 and 4. It says nothing about accuracy. Figures in cells are "
        "the SQNR in dB of the file against its graph, the worse of both batches (✘: a miss); "
        "codes that round differently show as less. Times are one thread's, interleaved (~ noisy). "
        f"All of it took {_hours(rows)} hours of one core; the last column has each member's share "
        "and its process's peak memory, where that was recorded.",
        "",
        f"| family | member | M params | {' | '.join(_COLUMNS.values())} | took |",
        "|:--|:--|--:|" + ":--|" * (len(_COLUMNS) + 1),
    ]
    reasons: dict[str, int] = {}
    for family, spec in members.items():
        row = rows.get(family)
        texts = [_cell(step, row, reasons) for step in _COLUMNS]
        params = "" if spec.params_m is None else f"{spec.params_m:g}"
        lines.append(f"| {family} | {spec.name} | {params} | {' | '.join(texts)} | {_took(row)} |")
    if reasons:
        lines += ["", "Why not:", ""]
        lines += [f"{number}. {_plain(reason)}" for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def _cell(step: str, row: Mapping[str, Any] | None, reasons: dict[str, int]) -> str:
    if row is None:
        return "–"
    cell = row["cells"].get(step)
    if cell is None:
        return _no("ended", row.get("ended", "the step was added later"), reasons)
    if "why" in cell:
        return _no("refused", cell["why"], reasons)
    if "failed" in cell:
        return _no("failed", cell["failed"], reasons)
    if step == "capture":
        return "yes" if cell["dynamic_batch"] else "batch 1 only"
    if step == "latency":
        ratio = "" if cell["ratio"] is None else f" (×{cell['ratio']:.2f})"
        noisy = " ~" if cell["noisy"] else ""
        return f"{cell['fp32_ms']:.1f} → {cell['w8a8_ms']:.1f}{ratio}{noisy}"
    return f"{cell['sqnr_db']:.0f}" + ("" if cell["passed"] else " ✘")


def _hours(rows: Mapping[str, Any]) -> str:
    return f"{sum(row.get('seconds') or 0.0 for row in rows.values()) / 3600:.1f}"


def _took(row: Mapping[str, Any] | None) -> str:
    if row is None or not row.get("seconds"):
        return "–"
    peak = max((cell.get("peak_rss_bytes", 0) for cell in row["cells"].values()), default=0)
    return f"{row['seconds'] / 60:.1f} min" + (f", {peak / 1e9:.1f} GB" if peak else "")


def _no(kind: str, reason: str, reasons: dict[str, int]) -> str:
    """A hole, with the number of its reason; equal reasons share one."""
    number = reasons.setdefault(f"{kind}: {reason}", len(reasons) + 1)
    return f"no ({number})"


def _plain(reason: str) -> str:
    """A reason as one line of Markdown that renders as written."""
    text = " ".join(reason.split())
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return text
