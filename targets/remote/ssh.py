"""Commands on a device by the system's own ssh, with the user's own settings and keys.

One connection (OpenSSH's ControlMaster) carries everything. Nothing is ever asked (BatchMode):
an unknown host key is refused, unless the user's settings accept it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploykit.errors import TargetMissingError
from deploykit.targets.remote.address import Address

__all__ = ["Ssh"]

_CONNECT_SECONDS = 15
_MENDS = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key is not the one known here; if it was "
    "set up anew, remove the old one with ssh-keygen -R",
    "Host key verification failed": "its host key is not known here; look at it and accept it by "
    "connecting once by hand",
    "Permission denied": "none of your keys is accepted there; give it one with ssh-copy-id, or "
    "name the key in ~/.ssh/config",
    "Could not resolve": "no such host; see the name",
    "Connection refused": "nothing listens there; see the port, and that sshd runs",
    "timed out": "no answer; see the address, and that the device is on",
    "No route to host": "no way there; see the address, and that the device is on",
}


class Ssh:
    """How to reach one device; ``DEPLOYKIT_SSH_CONFIG`` names another file than ~/.ssh/config.

    Raises:
        TargetMissingError: there is no ssh on this machine.
    """

    connect_seconds = _CONNECT_SECONDS + 5.0

    def __init__(self, address: Address) -> None:
        program = shutil.which("ssh")
        if program is None:
            message = "no ssh program here; install OpenSSH's client"
            raise TargetMissingError(message)
        self._address = address
        # short: the path of a socket may have no more than about 100 characters
        self._private = Path(tempfile.mkdtemp(prefix="dk"))
        config = os.environ.get("DEPLOYKIT_SSH_CONFIG")
        self._start = [program, *(["-F", config] if config else []), "-T"]
        self._start += ["-o", f"ControlPath={self._private / 's'}"]
        for option in (
            "BatchMode=yes",
            f"ConnectTimeout={_CONNECT_SECONDS}",
            "ServerAliveInterval=15",
            "ServerAliveCountMax=4",
            "ClearAllForwardings=yes",
            "LogLevel=ERROR",
        ):
            self._start += ["-o", option]
        if address.port is not None:
            self._start += ["-p", str(address.port)]
        if address.user is not None:
            self._start += ["-l", address.user]

    def connecting(self, words: Sequence[str]) -> list[str]:
        """The argument list of the process that holds the connection and runs ``words`` there."""
        return self._list(["-o", "ControlMaster=yes", "-o", "ControlPersist=no"], words)

    def running(self, words: Sequence[str]) -> list[str]:
        """The argument list that runs ``words`` over that connection."""
        # without the master it must fail, not connect anew
        return self._list(["-o", "ControlMaster=no", "-o", "ProxyCommand=false"], words)

    def _list(self, options: Sequence[str], words: Sequence[str]) -> list[str]:
        return [*self._start, *options, "--", self._address.host, shlex.join(words)]

    def explain(self, said: str) -> str:
        """What ssh said when it couldn't connect, in one line with the way to mend it."""
        last = (said.strip().splitlines() or ["ssh ended without a word"])[-1].strip()
        for sign, mend in _MENDS.items():
            if sign in said:
                return f"{mend} ({last})"
        return last

    def close(self) -> None:
        """Remove what the connection left here."""
        shutil.rmtree(self._private, ignore_errors=True)
