"""Energy of a call, where the machine counts it: RAPL for processors, NVML for NVIDIA's GPUs.

Both count everything on the package or the board, idling included and whatever else runs there:
a call's share is the counter's rise over many calls, divided by their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from deploykit.targets.nvml import Gpu

__all__ = ["Meter", "NvmlMeter", "RaplMeter", "energy_of_a_call", "find_rapl"]

_POWERCAP = Path("/sys/class/powercap")
_SECONDS = 1.0  # the counters move a thousand times in it
_LEAST_CALLS = 3


class Meter(Protocol):
    """Counts energy."""

    source: str

    def rise_mj(self) -> float:
        """Millijoules since it was asked last (or made)."""
        ...


class RaplMeter:
    """The processor packages' counters. They start again at a limit, after minutes.

    Args:
        packages: the folders of the zones, each with ``energy_uj`` and ``max_energy_range_uj``.

    Raises:
        OSError, ValueError: a counter can't be read.
    """

    def __init__(self, packages: list[Path]) -> None:
        self.source = "RAPL, whole package, idle included"
        self._files = [folder / "energy_uj" for folder in packages]
        self._ranges = [int((folder / "max_energy_range_uj").read_text()) for folder in packages]
        self._last = self._read()

    def rise_mj(self) -> float:
        """Millijoules since it was asked last; right if that is less than a whole turn."""
        now = self._read()
        rises = [
            after - before if after >= before else after - before + turn
            for after, before, turn in zip(now, self._last, self._ranges, strict=True)
        ]
        self._last = now
        return sum(rises) / 1e3

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file in self._files]


class NvmlMeter:
    """The GPU board's counter."""

    def __init__(self, gpu: Gpu) -> None:
        self.source = "NVML, whole board, idle included"
        self._gpu = gpu
        self._last = gpu.energy_mj()

    def rise_mj(self) -> float:
        """Millijoules since it was asked last."""
        now = self._gpu.energy_mj()
        rise, self._last = now - self._last, now
        return rise


def find_rapl(powercap: Path = _POWERCAP) -> tuple[RaplMeter | None, str]:
    """The packages' meter, or None with the reason."""
    packages = []
    for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's have that name, too
        try:
            if (folder / "name").read_text().startswith("package"):
                packages.append(folder)
        except OSError:
            continue
    if not packages:
        return None, f"this machine doesn't tell its energy (no RAPL in {powercap})"
    try:
        return RaplMeter(packages), ""
    except PermissionError:
        return None, f"only root may read {packages[0] / 'energy_uj'}; chmod a+r it to measure"
    except (OSError, ValueError):
        return None, f"{packages[0]}: its counter can't be read"


def energy_of_a_call(
    call: Callable[[], object],
    meter: Meter,
    seconds: float = _SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Millijoules of one call, from as many as ``seconds`` take. The model must be warm."""
    calls, start = 0, clock()
    meter.rise_mj()
    while calls < _LEAST_CALLS or clock() - start < seconds:
        call()
        calls += 1
    return meter.rise_mj() / calls
