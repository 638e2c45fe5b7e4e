"""How warm and how fast the machine is, read before and after it is measured.

Virtual machines and containers hide most of it: what is not told is None, and ``missing`` says
why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import psutil  # type: ignore[import-untyped, unused-ignore]

from deploykit.targets.nvml import POWER_CAP, Gpu

__all__ = ["StateFacts", "read_state", "throttled_between"]

_CPU_FILES = Path("/sys/devices/system/cpu")
# sensors of processors, not of disks and networks
_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal", "cpu-thermal")


class StateFacts(TypedDict):
    """The fields of a report's machine state."""

    cpu_mhz: float | None
    temperature_c: float | None
    throttled: int | None
    gpu_mhz: float | None
    gpu_temperature_c: float | None
    gpu_throttled: list[str]
    missing: list[str]


def read_state(
    cores: Sequence[int], gpu: Gpu | None = None, cpu_files: Path = _CPU_FILES
) -> StateFacts:
    """The state now.

    Args:
        cores: whose clocks and throttle counts are meant; the clock is their mean, the count
            their sum since the machine was started.
        gpu: asked too, where it is what is measured.
        cpu_files: the kernel's folder of processors.
    """
    missing = []
    clock = _clock(cores)
    if clock is None:
        missing.append("clock: the system tells none")
    temperature = _temperature()
    if temperature is None:
        missing.append("temperature: no sensor of the processor can be read")
    throttled = _throttled(cores, cpu_files)
    if throttled is None:
        missing.append("throttling: the kernel counts none here")
    asked: Mapping[str, Any] = {} if gpu is None else gpu.state()
    return StateFacts(
        cpu_mhz=clock,
        temperature_c=temperature,
        throttled=throttled,
        gpu_mhz=asked.get("gpu_mhz"),
        gpu_temperature_c=asked.get("gpu_temperature_c"),
        gpu_throttled=list(asked.get("gpu_throttled", [])),
        missing=missing,
    )


def throttled_between(before: StateFacts, after: StateFacts) -> str | None:
    """What slowed the machine down to save itself while it was measured, or None."""
    if before["throttled"] is not None and after["throttled"] is not None:
        times = after["throttled"] - before["throttled"]
        if times > 0:
            return f"the processor throttled itself {times} times"
    # at its power limit a GPU runs as it is sold; heat is another matter
    slowed = [reason for reason in after["gpu_throttled"] if reason != POWER_CAP]
    return f"the GPU throttled itself: {', '.join(slowed)}" if slowed else None


def _clock(cores: Sequence[int]) -> float | None:
    try:
        clocks = psutil.cpu_freq(percpu=True)
    except (AttributeError, NotImplementedError, OSError):
        return None
    told = [clocks[core].current for core in cores if core < len(clocks)]
    told = [value for value in told if value]
    return round(sum(told) / len(told), 1) if told else None


def _temperature() -> float | None:
    """Degrees Celsius of the hottest sensor of the processor."""
    try:
        sensors = psutil.sensors_temperatures()
    except (AttributeError, OSError):  # not on this system
        return None
    values = [one.current for name in _SENSORS for one in sensors.get(name, []) if one.current]
    return round(max(values), 1) if values else None


def _throttled(cores: Sequence[int], cpu_files: Path) -> int | None:
    counts = []
    for core in cores:
        file = cpu_files / f"cpu{core}" / "thermal_throttle" / "core_throttle_count"
        try:
            counts.append(int(file.read_text()))
        except (OSError, ValueError):
            continue
    return sum(counts) if counts else None
