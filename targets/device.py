"""What a measurement ran on: CPU, cores, instruction sets, governor, system.

Plain data, because the measuring process must not import the report's models.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypedDict

import psutil  # type: ignore[import-untyped, unused-ignore]

from deploykit.targets.nvml import Gpu

__all__ = [
    "DeviceFacts",
    "Neighbours",
    "allowed_cores",
    "cpu_facts",
    "describe",
    "peak_rss_bytes",
    "physical_cores",
    "pick_cores",
    "pin",
]

# those that decide which integer and half-precision kernels a runtime can choose
_ISA = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "avx512_fp16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_CPU_FILES = Path("/sys/devices/system/cpu")


class DeviceFacts(TypedDict):
    """The fields of a report's device description."""

    target: str
    device: str
    cores: int
    threads: int
    pinned_to: list[int]
    isa: list[str]
    governor: str | None
    accelerator: str | None
    drivers: dict[str, str]
    runtime: str
    os: str


def allowed_cores() -> list[int]:
    """Logical cores this process may run on, sorted. Without affinity on this system: all."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> list[list[int]]:
    """The allowed logical cores, those of one physical core together, sorted."""
    allowed = allowed_cores()
    groups = {tuple(sorted(_siblings(core) & set(allowed))) or (core,) for core in allowed}
    return sorted(list(group) for group in groups)


def pick_cores(threads: int) -> list[int]:
    """The ``threads`` allowed cores best to measure on; all allowed ones if there are fewer.

    Fastest class first (where efficiency cores exist), one thread per physical core before any
    two share one, then the least busy over a fifth of a second, then the lowest number.
    """
    cores = allowed_cores()
    if threads >= len(cores):
        return cores
    busy = psutil.cpu_percent(interval=0.2, percpu=True)
    load = {core: round(busy[core], -1) if core < len(busy) else 0.0 for core in cores}
    cores.sort(key=lambda core: (-_max_frequency(core), load[core], core))
    taken: set[int] = set()
    siblings_last: dict[int, bool] = {}
    for core in cores:
        siblings_last[core] = core in taken
        taken |= _siblings(core)
    cores.sort(key=lambda core: (-_max_frequency(core), siblings_last[core], load[core], core))
    return sorted(cores[:threads])


def pin(cores: Sequence[int]) -> list[int]:
    """Keep this process on ``cores``; what it is now pinned to, empty where that is impossible."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    os.sched_setaffinity(0, cores)
    return sorted(os.sched_getaffinity(0))


class Neighbours:
    """Counts, from its creation on, how much of ``cores`` others than this process take."""

    def __init__(self, cores: Sequence[int]) -> None:
        self._cores = list(cores)
        self._start = self._now()

    def share(self) -> float:
        """Part of the cores' time, 0 to 1, that other processes or the hypervisor took."""
        busy, own, wall = (now - then for now, then in zip(self._now(), self._start, strict=True))
        if wall <= 0 or not self._cores:
            return 0.0
        return min(1.0, max(0.0, (busy - own) / (wall * len(self._cores))))

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times(percpu=True)
        busy = 0.0
        for core in self._cores:
            if core < len(times):
                fields = times[core]._asdict()
                # user holds guest already
                idle = ("idle", "iowait", "guest", "guest_nice")
                busy += sum(value for name, value in fields.items() if name not in idle)
        return busy, time.process_time(), time.perf_counter()


def describe(
    target: str,
    runtime: str,
    *,
    threads: int,
    cores: int,
    pinned_to: Sequence[int],
    gpu: Gpu | None = None,
) -> DeviceFacts:
    """The device, for the report.

    Args:
        cores: how many logical cores the user's process has.
        gpu: what the target runs on, if it is one that can be asked.
    """
    brand, flags = cpu_facts()
    physical = psutil.cpu_count(logical=False) or 0
    logical = psutil.cpu_count(logical=True) or 0
    return DeviceFacts(
        target=target,
        device=f"{brand}, {physical or '?'} physical and {logical or '?'} logical cores",
        cores=cores,
        threads=threads,
        pinned_to=list(pinned_to),
        isa=[name for name in _ISA if name in flags] + ([gpu.architecture] if gpu else []),
        governor=_governor(pinned_to[0] if pinned_to else 0),
        accelerator=gpu.name if gpu else None,
        drivers=_drivers(gpu) if target.startswith("cuda") else {},
        runtime=runtime,
        os=platform.platform(),
    )


def peak_rss_bytes() -> int:
    """Most memory this process ever held resident, in bytes: interpreter, runtime and model."""
    status = Path("/proc/self/status")
    if status.exists():
        # not getrusage: on Linux its maximum survives exec, so it can be the parent's
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


@cache
def cpu_facts() -> tuple[str, frozenset[str]]:
    """The processor's name, and its features as the system calls them."""
    import cpuinfo  # takes a second: it times the clock

    info = cpuinfo.get_cpu_info()
    brand = info.get("brand_raw") or platform.processor() or platform.machine()
    return str(brand), frozenset(info.get("flags", ()))


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _governor(core: int) -> str | None:
    return _read(_CPU_FILES / f"cpu{core}" / "cpufreq" / "scaling_governor")


def _drivers(gpu: Gpu | None) -> dict[str, str]:
    if gpu is not None:
        return {"nvidia": gpu.driver}
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", _read(_DRIVER_FILE) or "")
    return {"nvidia": found[1]} if found else {}


def _max_frequency(core: int) -> int:
    text = _read(_CPU_FILES / f"cpu{core}" / "cpufreq" / "cpuinfo_max_freq")
    return int(text) if text and text.isdigit() else 0


def _siblings(core: int) -> set[int]:
    """Logical cores of the same physical core, from text such as ``0,4`` or ``0-1``."""
    text = _read(_CPU_FILES / f"cpu{core}" / "topology" / "thread_siblings_list") or str(core)
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
