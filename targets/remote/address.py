"""Names of targets on other devices, taken apart and checked.

``ssh://[user@]host[:port]/TARGET`` and ``adb:SERIAL/TARGET``, each with ``?python=/path`` (the
Python to use there), ``&tmp=/folder`` (where files may lie there) and ``&runner=/path`` (a native
program of this machine to send and use instead of Python, see ``native.py``) behind it, if need be.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from deploykit.errors import UsageError

__all__ = ["GRAMMAR", "Address", "is_remote", "parse"]

GRAMMAR = (
    "ssh://[user@]host[:port]/TARGET or adb:SERIAL/TARGET, "
    "then ?python=/path&tmp=/folder&runner=/path"
)

_OPTIONS = ("python", "tmp", "runner")
# No name may begin with a dash: ssh and adb would take it for an option.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*|[0-9A-Fa-f:]*:[0-9A-Fa-f:.]*(%[\w.-]+)?")
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")
_SERIAL = re.compile(r"[A-Za-z0-9_.\[][A-Za-z0-9_.:\[\]-]*")
_PATH = re.compile(r"[\w./+~-]+")


@dataclass(frozen=True)
class Address:
    """A device, and what to use on it. Two names of one device give equal ``device`` texts."""

    kind: Literal["ssh", "adb"]
    host: str
    """The host's name or address, or the phone's serial number."""
    user: str | None = None
    port: int | None = None
    python: str | None = None
    tmp: str | None = None
    runner: str | None = None

    @property
    def interpreter(self) -> str:
        """The Python to use there."""
        return self.python or os.environ.get("DEPLOYKIT_DEVICE_PYTHON") or "python3"

    @property
    def device(self) -> str:
        """How messages name it."""
        if self.kind == "adb":
            return f"adb:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        port = f":{self.port}" if self.port else ""
        return f"ssh://{user}{host}{port}"


def is_remote(name: str) -> bool:
    """Whether a target's name says that it is on another device."""
    return name.startswith(("ssh:", "adb:"))


def parse(name: str) -> tuple[Address, str]:
    """The device and the name of the target on it, which is empty if there is none.

    Raises:
        UsageError: the name isn't written as ``GRAMMAR`` says.
    """
    place, _, query = name.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in _OPTIONS:
            message = f"{name}: wanted {' or '.join(_OPTIONS)} behind the ?, got {key!r}"
            raise UsageError(message)
        if not _PATH.fullmatch(value) or value.startswith("-"):
            message = f"{name}: wanted a plain path for {key}, got {value!r}"
            raise UsageError(message)
    python, tmp, runner = map(options.get, _OPTIONS)
    if place.startswith("adb:"):
        serial, _, target = place.removeprefix("adb:").rpartition("/")
        serial, target = (serial, target) if serial else (target, "")
        if not _SERIAL.fullmatch(serial):
            raise _unreadable(name)
        return Address("adb", serial, None, None, python, tmp, runner), target
    try:
        parts = urlsplit(place)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise _unreadable(name) from None
    if parts.scheme != "ssh" or not _HOST.fullmatch(host) or parts.password is not None:
        raise _unreadable(name)
    if parts.username is not None and not _USER.fullmatch(parts.username):
        raise _unreadable(name)
    target = parts.path.removeprefix("/")
    return Address("ssh", host, parts.username, port, python, tmp, runner), target


def _unreadable(name: str) -> UsageError:
    return UsageError(f"{name}: no device can be read from it; wanted {GRAMMAR}")
