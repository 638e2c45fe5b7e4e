"""How numbers are said, the same in every rendering of a report.

Signs are of the change: a minus is a loss of accuracy. Intervals are 95 %.
"""

from __future__ import annotations

import math
import unicodedata

from deploykit.types import Accuracy, Measurement

__all__ = [
    "NO_CLASSES",
    "REFUSED",
    "TOO_NOISY",
    "bytes_text",
    "change",
    "clean",
    "clean_lines",
    "count_text",
    "drop_sentence",
    "interval",
    "machine",
    "ms",
    "percent",
    "ratio_short",
    "ratio_text",
    "shorten",
    "sqnr",
]

NO_CLASSES = "no classes"
REFUSED = "refused: untrained weights"
TOO_NOISY = "too noisy"
_MINUS = "\N{MINUS SIGN}"


def clean(text: object) -> str:
    """One line without control characters; names come from files we did not write."""
    return clean_lines(" ".join(str(text).splitlines()).replace("\t", " "))


def clean_lines(text: str) -> str:
    """The text without control characters (escape sequences, bidi overrides); lines stay."""
    if text.isprintable():
        return text
    return "".join(
        c if c == "\n" or unicodedata.category(c)[0] != "C" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def shorten(text: str, limit: int = 40) -> str:
    """At most ``limit`` characters, the middle left out: both ends of a layer's name tell."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 2
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def bytes_text(size: float | None) -> str:
    """``12.3 MB`` (decimal: a megabyte is 10^6 bytes)."""
    if size is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{_three(size / factor)} {unit}"
    return f"{size:.0f} B"


def count_text(count: int | None) -> str:
    """``16.5 M`` parameters, ``3.97 G`` operations."""
    if count is None:
        return "–"
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{_three(count / factor)} {unit}"
    return str(count)


def ms(value: float | None) -> str:
    """Milliseconds with three digits, without the unit."""
    return "–" if value is None else _three(value)


def percent(value: float | None) -> str:
    """``79.35 %``."""
    return "–" if value is None else f"{value:.2f} %"


def sqnr(value: float) -> str:
    """``31.2 dB``; an output equal to the reference has no noise to speak of."""
    return "identical" if value == math.inf else f"{value:.1f} dB".replace("-", _MINUS)


def change(points: float, digits: int = 2) -> str:
    """A signed change, ``−0.35`` or ``+0.20``; a rounded nought has no sign."""
    text = f"{abs(points):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{_MINUS if points < 0 else '+'}{text}"


def drop_sentence(accuracy: Accuracy) -> str:
    """``−0.35 points (95 % interval −0.9 … +0.2), 12 images lost, 5 gained of 2000``."""
    low, high = change(-accuracy.drop_high), change(-accuracy.drop_low)
    return (
        f"{change(-accuracy.drop)} points (95 % interval {low} … {high}), "
        f"{accuracy.lost} images lost, {accuracy.gained} gained of {accuracy.images}"
    )


def interval(measurement: Measurement) -> str:
    """The interval of the median, ``4.31 … 4.52``."""
    return f"{ms(measurement.p50_low_ms)} … {ms(measurement.p50_high_ms)}"


def machine(measurement: Measurement) -> str:
    """How fast and warm the machine was before and after, and what is not known of it."""
    device = measurement.device
    before, after = device.before, device.after
    parts = [device.accelerator or "", *(f"{k} driver {v}" for k, v in device.drivers.items())]
    if measurement.ran_as:
        parts.append(f"ran as {measurement.ran_as}")
    if before is not None and after is not None:
        for unit, first, last in (
            ("MHz", before.cpu_mhz, after.cpu_mhz),
            ("°C", before.temperature_c, after.temperature_c),
            ("MHz (GPU)", before.gpu_mhz, after.gpu_mhz),
            ("°C (GPU)", before.gpu_temperature_c, after.gpu_temperature_c),
        ):
            if first is not None and last is not None:
                parts.append(f"{first:.0f} → {last:.0f} {unit}")
        parts += [f"no {line}" for line in before.missing]
    if measurement.energy_mj is not None:
        parts.append(f"{_three(measurement.energy_mj)} mJ a call ({measurement.energy})")
    elif measurement.energy:
        parts.append(f"no energy: {measurement.energy}")
    return "; ".join(part for part in parts if part)


def ratio_short(measurement: Measurement) -> str:
    """``2.10× faster``, ``1.05× slower``, or that the interval (or noise) does not let us say."""
    ratio = measurement.ratio
    if ratio is None or ratio <= 0:
        return "–"
    if measurement.comparison_noisy:
        return TOO_NOISY
    low, high = measurement.ratio_low, measurement.ratio_high
    if low is not None and high is not None and low <= 1 <= high:
        return "no clear change"
    return f"{1 / ratio:.2f}× faster" if ratio < 1 else f"{ratio:.2f}× slower"


def ratio_text(measurement: Measurement) -> str:
    """The same with the figure itself: ``2.10× faster (0.476 of its time, 0.460 … 0.490)``."""
    if measurement.ratio is None or measurement.comparison_noisy:
        return ratio_short(measurement)
    text = f"{ratio_short(measurement)} ({measurement.ratio:.3f} of the original's time"
    if measurement.ratio_low is not None and measurement.ratio_high is not None:
        text += f", {measurement.ratio_low:.3f} … {measurement.ratio_high:.3f}"
    return text + ")"


def _three(value: float) -> str:
    """Three significant digits, without an exponent."""
    if not math.isfinite(value):
        return str(value)
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.3g}" if 0 < abs(value) < 0.1 else f"{value:.{digits}f}"
