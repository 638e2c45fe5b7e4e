"""``docs/phase3.md`` from the results of ``declined.py``."""

from __future__ import annotations

from typing import Any

from deploykit.backbones.declined import DECLINED
from deploykit.backbones.registry import families

__all__ = ["page"]

Results = dict[str, dict[str, Any]]

# family of the reading list, registered name, the probe that belongs to it
MADE = (
    ("SG-Former", "SG-Former", ""),
    ("VMamba", "VMamba", ""),
    ("Res-VMamba", "Res-VMamba", ""),
    ("Meta-SpikeFormer", "Meta-SpikeFormer", "spikes"),
)


def measured(results: Results, probe: str) -> str:
    """A probe's result as one sentence."""
    if probe not in results:
        return f"not measured yet: `python -m benchmarks.declined --only {probe}`"
    result = results[probe]
    if "refused" in result:
        return f"{result['part']}: “{result['refused']}”"
    if "summary" in result:
        return f"{result['part']}: {result['summary']}"
    if "plain_db" in result:
        return (
            f"{result['part']}: scores before and after a shift agree to "
            f"{result['anchored_db']:.0f} dB with it, {result['plain_db']:.0f} dB without"
        )
    return (
        f"{result['part']}: {result['ratio']:.2f} ({result['ratio_low']:.2f} … "
        f"{result['ratio_high']:.2f}) times {result['against']}; {result['nodes']} ONNX nodes "
        f"against {result['against_nodes']}, error {result['error']:.0e}"
    )


def page(results: Results) -> str:
    """The page as Markdown."""
    known = families()
    lines = [
        "# The last families: made or declined",
        "",
        "Made by `python -m benchmarks.declined`. Ratios are processor times of ONNX files in ONNX "
        "Runtime, one thread, against something ordinary, interleaved; the median of blocks and "
        "the range without the outer tenths. Weights are random. What a name that isn't here "
        "answers is the reason in this table (`deploykit/backbones/declined.py`).",
        "",
        "## Made",
        "",
        "| network | names | M parameters | measured |",
        "|:--|:--|:--|:--|",
    ]
    for paper, family, probe in MADE:
        members = known[family]
        names = ", ".join(f"`{m.name}`" for m in members)
        counts = ", ".join(f"{m.params_m:g}" for m in members)
        lines.append(
            f"| {paper} | {names} | {counts} | {measured(results, probe) if probe else ''} |"
        )
    lines += [
        f"| adaptive polyphase anchoring | `--insert polyphase` (Twins-SVT) | none of its own | "
        f"{measured(results, 'shift')} |",
        "",
        "## Declined",
        "",
        "| network | reason | nearest | measured |",
        "|:--|:--|:--|:--|",
    ]
    for entry in DECLINED:
        nearest = ", ".join(f"`{name}`" for name in entry.nearest)
        result = measured(results, entry.probe) if entry.probe else "nothing to measure"
        lines.append(f"| {entry.name} | {entry.reason} | {nearest} | {result} |")
    return "\n".join(lines) + "\n"
