"""Commands on an Android device, or anything that runs adbd, by the Android Debug Bridge."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence

from deploykit.errors import TargetMissingError, one_line
from deploykit.targets.remote.address import Address

__all__ = ["Adb"]

_MENDS = {
    "unauthorized": "it doesn't trust this machine yet; accept its key on the device's screen",
    "not found": "adb devices doesn't list it; plug it in, or adb connect HOST:PORT",
    "no devices": "adb devices lists none; plug it in, or adb connect HOST:PORT",
    "offline": "it doesn't answer; plug it in again, or adb reconnect",
    "no permissions": "this user may not use the USB device; see adb's udev rules",
}


class Adb:
    """How to reach one device.

    Raises:
        TargetMissingError: there is no adb on this machine, adb doesn't know the device, or the
            device's adbd is too old to tell how a command ended (before Android 7).
    """

    connect_seconds = 20.0

    def __init__(self, address: Address) -> None:
        program = shutil.which("adb")
        if program is None:
            message = "no adb program here; install Android's platform tools"
            raise TargetMissingError(message)
        self._start = [program, "-s", address.host]
        features = self._features()
        if "shell_v2" not in features:
            message = f"{address.device}: its adbd lacks shell_v2; Android 7 or newer is needed"
            raise TargetMissingError(message)

    def _features(self) -> list[str]:
        try:
            done = subprocess.run(
                [*self._start, "features"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.connect_seconds,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            message = f"{self._start[-1]}: adb gave no answer: {one_line(error)}"
            raise TargetMissingError(message) from error
        if done.returncode != 0:
            message = f"adb:{self._start[-1]}: {self.explain(done.stderr or done.stdout)}"
            raise TargetMissingError(message)
        return done.stdout.split()

    def connecting(self, words: Sequence[str]) -> list[str]:
        """The argument list of the process that runs ``words`` there for the whole session."""
        return self.running(words)

    def running(self, words: Sequence[str]) -> list[str]:
        """The argument list that runs ``words`` there."""
        # -T: no terminal, so bytes pass as they are; adb hands one string to the device's shell
        return [*self._start, "shell", "-T", shlex.join(words)]

    def explain(self, said: str) -> str:
        """What adb said, in one line with the way to mend it."""
        lines = [line for line in said.strip().splitlines() if not line.startswith("*")]
        last = lines[-1].strip() if lines else "adb ended without a word"
        for sign, mend in _MENDS.items():
            if sign in last:
                return f"{mend} ({last})"
        return last

    def close(self) -> None:
        """Nothing was left here."""
