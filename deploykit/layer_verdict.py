"""What two profiles say in words: what is slower, what it costs, and the line that mends it."""

from __future__ import annotations

import glob
import json
import statistics
from collections.abc import Collection, Iterable, Sequence

from deploykit.layer_profile import layer_costs
from deploykit.placement import Comparison, LayerDelta, choose_float, compare_layers
from deploykit.types import LayerProfile

__all__ = ["float_layers_option", "keep_in_float", "times_ratio", "verdict_lines"]

_NAMED = 6


def times_ratio(floats: LayerProfile, quantised: LayerProfile) -> tuple[float, float, float]:
    """Time of a file against another's: median, least and largest over the rounds."""
    before, after = (_round_totals(profile) for profile in (floats, quantised))
    ratios = [b / a for a, b in zip(before, after, strict=False) if a > 0]
    if not ratios:
        one = quantised.total_ms / floats.total_ms
        return one, one, one
    return statistics.median(ratios), min(ratios), max(ratios)


def _round_totals(profile: LayerProfile) -> list[float]:
    times = [row.rounds_ms for row in profile.layers if row.rounds_ms]
    return [sum(one) for one in zip(*times, strict=True)]


def keep_in_float(comparison: Comparison, already: Collection[str] = ()) -> list[str]:
    """The layers to be left in float that aren't yet, in the file's order."""
    chosen = choose_float(comparison, already)
    return [x.name for x in comparison.layers if x.name in chosen and x.name not in already]


def float_layers_option(layers: Iterable[str], before: Iterable[str] = ()) -> str:
    """The option that leaves layers in float, as a shell takes it.

    Args:
        before: globs of layers that the recipe leaves in float already.
    """
    names = [*before, *(glob.escape(layer) for layer in layers)]
    return f"--set 'quantize.float_layers={json.dumps(names, ensure_ascii=False)}'"


def verdict_lines(
    floats: LayerProfile, quantised: LayerProfile, before: Sequence[str] = ()
) -> list[str]:
    """What the profiles of a float file and of its quantised one say, most important first.

    Args:
        before: globs of ``quantize.float_layers`` that the quantised file was made with.
    """
    comparison = compare_layers(layer_costs(floats), layer_costs(quantised))
    ratio, low, high = times_ratio(floats, quantised)
    narrow, target = quantised.artifact, quantised.target
    times = f"{quantised.total_ms:.3g} ms against {floats.total_ms:.3g} ms"
    spread = f"{ratio:.2f} of its time, {low:.2f} to {high:.2f} over the rounds"
    if low > 1:
        lines = [f"{narrow} is slower than {floats.artifact} on {target}: {times} ({spread})"]
    elif high < 1:
        lines = [f"{narrow} is faster than {floats.artifact} on {target}: {times} ({spread})"]
    else:
        lines = [f"{narrow} and {floats.artifact} take alike on {target}: {times} ({spread})"]
    lines += _costs(comparison)
    if any(row.op.startswith("deploykit::") for row in quantised.layers):
        # nothing to be kept in float for: no layer can be faster where floats are all there is
        lines.append(
            f"{narrow}'s codes are simulated in floats here: its times say nothing of integer "
            "kernels; profile the file of a target that has them"
        )
        return lines
    in_float = [x.name for x in comparison.layers if x.precision not in ("", "int8")]
    wasted = [x for x in comparison.layers if x.name in in_float and x.quantise_ms > 0]
    if wasted:
        lines.append(f"converted to codes and back, but computed in float: {_named(wasted)}")
    if comparison.slower:
        lines.append(f"slower in {narrow} than in {floats.artifact}: {_deltas(comparison.slower)}")
    keep = keep_in_float(comparison)
    if not comparison.layers or comparison.quantised_ms <= 0 or not keep:
        return lines
    if len(keep) == len(comparison.layers):
        lines.append("no layer is faster quantised: ship the float file on this target")
        return lines
    gain = comparison.predicted(keep)
    lines.append(
        f"keep these in float: {float_layers_option(keep, before)} "
        f"(predicted {gain:.3g} ms, before what float layers cost between integer ones)"
    )
    return lines


def _costs(comparison: Comparison) -> list[str]:
    quantise = sum(layer.quantise_ms for layer in comparison.layers)
    reformat = sum(layer.reformat_ms for layer in comparison.layers)
    whole = comparison.quantised_ms
    if quantise + reformat <= 0 or whole <= 0:
        return []
    parts = [f"{quantise:.3g} ms ({quantise / whole:.0%}) goes into codes and back (Q/DQ)"]
    if reformat > 0:
        parts.append(
            f"{reformat:.3g} ms ({reformat / whole:.0%}) more than in float into moving values"
        )
    return ["; ".join(parts)]


def _named(layers: Sequence[LayerDelta]) -> str:
    names = [layer.name for layer in layers[:_NAMED]]
    return ", ".join(names) + _more(layers)


def _deltas(layers: Sequence[LayerDelta]) -> str:
    texts = [
        f"{x.name} (+{x.delta:.3g} ms, {x.quantised_ms:.3g} against {x.float_ms:.3g})"
        for x in layers[:_NAMED]
    ]
    return ", ".join(texts) + _more(layers)


def _more(layers: Sequence[LayerDelta]) -> str:
    return f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
