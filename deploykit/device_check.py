"""What ``deploykit doctor --device`` shows: a remote device and the targets on it."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from deploykit.errors import UsageError
from deploykit.targets.registry import get_target, list_targets
from deploykit.targets.remote.address import GRAMMAR, is_remote, parse
from deploykit.targets.remote.facts import DeviceState, ask_device
from deploykit.targets.remote.session import session_on

__all__ = ["check_device", "device_table"]


def check_device(name: str) -> tuple[DeviceState, dict[str, str | None]]:
    """A device such as ``ssh://pi@board``, and each target with what it lacks there.

    Raises:
        UsageError: the name can't be read.
        TargetMissingError: the device can't be reached.
    """
    if not is_remote(name):
        raise UsageError(f"{name}: no device can be read from it; wanted {GRAMMAR}")
    address, target = parse(name)
    state = ask_device(session_on(address))
    place, _, query = name.partition("?")
    place = place.removesuffix("/" + target) if target else place.rstrip("/")
    rows = {}
    for inner in [target] if target else list_targets():
        full = f"{place}/{inner}" + (f"?{query}" if query else "")
        reason = get_target(full).available()
        rows[full] = reason and reason.removeprefix(f"{address.device}: ")
    return state, rows


def device_table(state: DeviceState, rows: dict[str, str | None]) -> Table:
    """Targets first, then the device itself."""
    table = Table("what", "state", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, reason in rows.items():
        found = Text("ok", style="green") if reason is None else Text(reason, style="yellow")
        table.add_row(Text(f"target {name}"), found)
    table.add_section()
    for name, value in _facts(state).items():
        table.add_row(Text(name), Text(value))
    return table


def _facts(state: DeviceState) -> dict[str, str]:
    governors = sorted({core.governor for core in state.cores if core.governor})
    speeds = sorted({core.max_khz for core in state.cores if core.max_khz})
    facts: dict[str, Any] = {
        "device": state.model,
        "machine": state.machine,
        "system": state.system,
        "python": state.python or "none",
        "cores": f"{len(state.cores)}"
        + (f", up to {', '.join(f'{khz / 1e6:.2f}' for khz in speeds)} GHz" if speeds else ""),
        "governor": ", ".join(governors) or "not said",
        "thermal": ", ".join(f"{name} {value:.0f} °C" for name, value in state.zones.items())
        or "not said",
        "throttling": state.throttling,
        "memory": state.memory_bytes and f"{state.memory_bytes / 1e9:.1f} GB",
        "free space": state.free_bytes and f"{state.free_bytes / 1e9:.1f} GB",
    }
    return {name: str(value) for name, value in facts.items() if value}
