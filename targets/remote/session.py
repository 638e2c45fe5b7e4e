"""A private folder on a device for as long as this process uses the device.

One process there, the keeper, makes the folder and removes it when its input ends: at the end of
the session, when the connection is cut, or when this process dies in whatever way.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from deploykit.errors import DeploykitError, MeasurementError, TargetMissingError, UsageError
from deploykit.targets.remote import scripts
from deploykit.targets.remote.adb import Adb
from deploykit.targets.remote.address import Address
from deploykit.targets.remote.packing import companions, pack, package_files
from deploykit.targets.remote.ssh import Ssh

__all__ = ["Session", "close_sessions", "session_on"]

_ALIVE_SECONDS = 30.0
_COMMAND_SECONDS = 120.0
_SEND_SECONDS = 3600.0
_END_SECONDS = 10.0
_FULL = ("No space left", "quota exceeded", "File too large")


class Transport(Protocol):
    """A way to run commands on a device: ``Ssh`` or ``Adb``."""

    connect_seconds: float

    def connecting(self, words: Sequence[str]) -> list[str]:
        """The argument list of the process that holds the connection and runs ``words``."""
        ...

    def running(self, words: Sequence[str]) -> list[str]:
        """The argument list that runs ``words`` on the device meanwhile."""
        ...

    def explain(self, said: str) -> str:
        """What it said on standard error when it couldn't connect, in one line."""
        ...

    def close(self) -> None:
        """Remove what it left on this machine."""
        ...


class Session:
    """An open connection to a device.

    Raises:
        TargetMissingError: the device can't be reached.
        UsageError: there is no room on it, or its folder can't be written.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._transport: Transport = Ssh(address) if address.kind == "ssh" else Adb(address)
        self._sent: dict[str, str] = {}
        self._numbers = itertools.count()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        words = ["sh", "-c", scripts.KEEPER, "deploykit", address.tmp or ""]
        try:
            self._keeper = subprocess.Popen(
                self._transport.connecting(words),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,  # Ctrl-C is ours: what runs there is ended in order
            )
        except OSError as error:
            self._transport.close()
            message = f"{address.device}: cannot start {error.filename}: {error.strerror}"
            raise TargetMissingError(message) from error
        try:
            self.folder = self._await_folder()
        except BaseException:
            self.close()
            raise
        self._closing = threading.Event()
        threading.Thread(target=self._stay_alive, daemon=True).start()

    def _await_folder(self) -> str:
        assert self._keeper.stdout is not None
        seconds = self._transport.connect_seconds
        timer = threading.Timer(seconds, self._keeper.kill)
        timer.start()
        try:
            for line in self._keeper.stdout:  # a login shell may say things first
                text = line.decode(errors="replace").strip()
                if text.startswith(scripts.READY):
                    return text.removeprefix(scripts.READY)
            self._keeper.wait()
        finally:
            in_time = timer.is_alive()
            timer.cancel()
        if not in_time:
            message = f"{self.address.device}: no answer for {seconds:g} s"
            raise TargetMissingError(message)
        self._stderr.seek(0)
        said = self._stderr.read()[-4000:].decode(errors="replace")
        if any(sign in said for sign in _FULL):
            raise self._full()
        if "mktemp" in said:
            last = said.strip().splitlines()[-1]
            message = f"{self.address.device}: no folder can be made there ({last}); name one "
            raise UsageError(message + "with ?tmp=/folder")
        message = f"{self.address.device}: {self._transport.explain(said)}"
        raise TargetMissingError(message)

    def _full(self) -> UsageError:
        where = self.address.tmp or "its folder for temporary files"
        text = "no space left in {}; free some, or name another folder with ?tmp=/folder"
        return UsageError(f"{self.address.device}: {text.format(where)}")

    def _stay_alive(self) -> None:
        """The keeper takes long silence for a network that went away without a word."""
        stdin = self._keeper.stdin
        assert stdin is not None
        while not self._closing.wait(_ALIVE_SECONDS):
            with contextlib.suppress(OSError, ValueError):
                stdin.write(b"\n")
                stdin.flush()

    def lost(self, wait_seconds: float = 1.0) -> bool:
        """Whether the connection is gone; one that is being cut may take a moment to show it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(wait_seconds)
        return self._keeper.poll() is not None

    def run(
        self,
        words: Sequence[str],
        stdin: IO[bytes] | None = None,
        seconds: float = _COMMAND_SECONDS,
    ) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command on the device.

        Raises:
            MeasurementError: the connection is lost, or it gave no answer in time.
        """
        command, name = self.start(words)
        try:
            return self.complete(command, stdin, seconds)
        except BaseException:  # else it has ended
            self.stop(name)
            raise

    def complete(
        self,
        command: Sequence[str],
        stdin: IO[bytes] | None = None,
        seconds: float = _COMMAND_SECONDS,
    ) -> tuple[int, str, str]:
        """As ``run``, of an argument list that ``start`` or ``process`` gave.

        Raises:
            MeasurementError: as ``run``.
        """
        self._demand_connection()
        try:
            done = subprocess.run(
                list(command),
                stdin=stdin or subprocess.DEVNULL,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            message = f"{self.address.device}: no answer for {seconds:g} s"
            raise MeasurementError(message) from error
        if done.returncode != 0:
            self._demand_connection(wait_seconds=0.3)
        out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        return done.returncode, out, err

    def _demand_connection(self, wait_seconds: float = 0.0) -> None:
        if self.lost(wait_seconds):
            raise self.loss()

    def loss(self) -> MeasurementError:
        """What to raise where the connection is gone."""
        text = "the connection was lost; what was sent there is removed by the device itself"
        return MeasurementError(f"{self.address.device}: {text}")

    def send(self, path: Path) -> str:
        """Put an artefact on the device, unless it is there; its path there.

        Raises:
            UsageError: there is no room.
            MeasurementError: it couldn't be sent.
        """
        return f"{self._send(companions(path))}/{path.name}"

    def package(self) -> str:
        """Put the part of this package on the device that it needs; the path of its start."""
        return f"{self._send(package_files())}/start.py"

    def _send(self, files: Sequence[tuple[str, Path]]) -> str:
        with tempfile.TemporaryFile() as archive:
            try:
                digest = pack(files, archive)
            except OSError as error:
                message = f"{error.filename}: cannot be read: {error.strerror}"
                raise UsageError(message) from error
            if digest not in self._sent:
                words = ["sh", "-c", scripts.RECEIVE, "deploykit", self.folder, digest]
                code, out, said = self.run(words, archive, _SEND_SECONDS)
                if code != 0 or "received" not in out.split():
                    self._demand_connection(wait_seconds=1.0)
                    if any(sign in said for sign in _FULL):
                        raise self._full()
                    last = (said.strip().splitlines() or [f"exit code {code}"])[-1]
                    message = f"{self.address.device}: a file can't be put there: {last}"
                    raise MeasurementError(message)
                self._sent[digest] = f"{self.folder}/files/{digest}"
        return self._sent[digest]

    def start(self, words: Sequence[str]) -> tuple[list[str], str]:
        """The argument list that runs ``words`` in our folder there, and a name to stop it by."""
        name = f"p{next(self._numbers)}"
        return self._transport.running(
            ["sh", "-c", scripts.LAUNCH, "deploykit", self.folder, name, *words]
        ), name

    def stop(self, name: str) -> None:
        """End a started process, if it hasn't ended; ending ours here doesn't end that there."""
        with contextlib.suppress(DeploykitError):  # gone: the keeper ends it
            words = ["sh", "-c", scripts.STOP, "deploykit", self.folder, name]
            self.complete(self._transport.running(words), seconds=_END_SECONDS)

    @contextlib.contextmanager
    def process(self, words: Sequence[str]) -> Iterator[list[str]]:
        """The argument list of ``start``; what it runs there is ended at the end."""
        command, name = self.start(words)
        try:
            yield command
        finally:
            self.stop(name)

    def close(self) -> None:
        """End what runs on the device, and remove our folder there."""
        if hasattr(self, "_closing"):
            self._closing.set()
        for pipe in (self._keeper.stdin, self._keeper.stdout):
            assert pipe is not None
            if pipe is self._keeper.stdout:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._keeper.wait(_END_SECONDS)  # the folder is gone when it has ended
                self._keeper.kill()
                self._keeper.wait()
            with contextlib.suppress(OSError, ValueError):
                pipe.close()
        self._stderr.close()
        self._transport.close()


_OPEN: dict[Address, Session] = {}
_LOCK = threading.Lock()


def session_on(address: Address) -> Session:
    """The open session on a device; one that was lost is opened anew.

    Raises:
        TargetMissingError, UsageError: as ``Session``.
    """
    with _LOCK:
        known = _OPEN.get(address)
        if known is not None and known.lost(0.0):
            known.close()
            del _OPEN[address]
            known = None
        if known is None:
            known = _OPEN[address] = Session(address)
        return known


def close_sessions(*_: Any) -> None:
    """End all sessions; called at the end of this process, too."""
    with _LOCK:
        while _OPEN:
            _OPEN.popitem()[1].close()


atexit.register(close_sessions)
