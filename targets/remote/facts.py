"""What a device is: asked of its shell, so that one without Python can answer, too."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, field
from typing import Any

from deploykit.errors import MeasurementError
from deploykit.targets.remote import scripts
from deploykit.targets.remote.session import Session

__all__ = ["Core", "DeviceState", "ask_device"]


@dataclass(frozen=True)
class Core:
    """A logical core; its highest frequency in kHz is 0 where the system doesn't say."""

    number: int
    max_khz: int
    governor: str | None


@dataclass(frozen=True)
class DeviceState:
    """The device as its own system describes it. ``zones`` are temperatures in °C by name."""

    machine: str = ""
    system: str = ""
    model: str = ""
    python: str = ""
    free_bytes: int | None = None
    memory_bytes: int | None = None
    throttling: str | None = None
    pins: bool = False
    """Whether it has a taskset, which keeps a process on given cores."""
    cores: list[Core] = field(default_factory=list)
    zones: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def fastest(self, count: int) -> list[int]:
        """The ``count`` cores of the highest frequency; a phone's big cores."""
        order = sorted(self.cores, key=lambda core: (-core.max_khz, core.number))
        return sorted(core.number for core in order[:count])


def ask_device(session: Session) -> DeviceState:
    """What the device says now.

    Raises:
        MeasurementError: it gave no answer.
    """
    words = ["sh", "-c", scripts.FACTS, "deploykit", session.folder, session.address.interpreter]
    code, out, _ = session.run(words)
    if code != 0 or "machine=" not in out:
        raise MeasurementError(f"{session.address.device}: it doesn't say what it is")
    found: dict[str, Any] = {}
    cores, zones = [], {}
    for line in out.splitlines():
        key, _, value = line.partition("=")
        value = value.strip()
        if key == "core":
            cores.append(_core(value))
        elif key == "zone":
            with contextlib.suppress(ValueError):
                name, _, millidegrees = value.rpartition(" ")
                zones[name or "zone"] = int(millidegrees) / 1000
        elif key in ("free_kb", "memory_kb"):
            found[key.replace("kb", "bytes")] = int(value) * 1024 if value.isdigit() else None
        elif key == "taskset":
            found["pins"] = bool(value)
        elif key in ("machine", "system", "model", "python", "throttling"):
            found[key] = value
    return DeviceState(**found, cores=sorted(cores, key=lambda core: core.number), zones=zones)


def _core(text: str) -> Core:
    number, frequency, governor = text.split()
    return Core(int(number), int(frequency), None if governor == "-" else governor)
