"""Devices for tests: a real sshd, a real adbd, on this machine's loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SSHD = shutil.which("sshd") or (p if Path(p := "/usr/sbin/sshd").exists() else None)
ADBD = os.environ.get("DEPLOYKIT_TEST_ADBD") or shutil.which("adbd")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on port {port}")


def keygen(path: Path) -> Path:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


@dataclass
class SshDevice:
    """A running sshd that accepts one key, and the client's settings for it."""

    folder: Path
    port: int
    daemon: subprocess.Popen[bytes]
    tmp: Path = field(init=False)

    def __post_init__(self) -> None:
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir()
        self.settings()

    def settings(self, key: str = "user", known: str = "known_hosts") -> None:
        (self.folder / "config").write_text(
            f"Host *\n  IdentityFile {self.folder / key}\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder / known}\n  GlobalKnownHostsFile /dev/null\n"
        )

    @property
    def address(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    def target(self, inner: str = "cpu-onnxruntime", python: str = sys.executable) -> str:
        return f"{self.address}/{inner}?python={python}&tmp={self.tmp}"

    def left(self) -> list[str]:
        """Files on the device, once it had a moment to clean up."""
        for _ in range(100):
            if not any(self.tmp.iterdir()):
                return []
            time.sleep(0.05)
        return sorted(str(path) for path in self.tmp.rglob("*"))

    def cut(self) -> None:
        """End every connection, as a cable would; the daemon stays."""
        import psutil

        for child in psutil.Process(self.daemon.pid).children():
            child.kill()


@contextmanager
def ssh_device(folder: Path) -> Iterator[SshDevice]:
    """An sshd on a free port.

    Skips the test where there is no sshd.
    """
    if SSHD is None or shutil.which("ssh") is None:
        pytest.skip("no sshd or ssh here (Debian: openssh-server, openssh-client)")
    folder.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    host, user, port = keygen(folder / "host"), keygen(folder / "user"), free_port()
    keygen(folder / "stranger")
    public = host.with_suffix(".pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")
    shutil.copy(user.with_suffix(".pub"), folder / "authorized")
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {host}\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder / 'authorized'}\nStrictModes no\n"
        # bash reads no .bashrc at this level: the tests don't pay for this user's
        "SetEnv SHLVL=5\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
    )
    daemon = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
        stdin=subprocess.DEVNULL,
        stderr=(folder / "sshd.log").open("wb"),
    )
    try:
        wait_for(port)
        yield SshDevice(folder, port, daemon)
    finally:
        daemon.kill()
        daemon.wait()


@dataclass
class AdbDevice:
    """A running adbd and the serial number by which adb knows it."""

    folder: Path
    serial: str
    daemon: subprocess.Popen[bytes]
    tmp: Path = field(init=False)

    def __post_init__(self) -> None:
        self.tmp = self.folder / "tmp"
        self.tmp.mkdir()

    def target(self, inner: str = "cpu-onnxruntime") -> str:
        return f"adb:{self.serial}/{inner}?python={sys.executable}&tmp={self.tmp}"

    left = SshDevice.left

    def vanish(self) -> None:
        """As when the plug is pulled or the battery is empty."""
        self.daemon.kill()
        self.daemon.wait()


@contextmanager
def adb_device(folder: Path) -> Iterator[AdbDevice]:
    """An adbd on a free port, known to an adb server of its own (``ANDROID_ADB_SERVER_PORT``).

    Skips the test where there is no adb or adbd. Debian has no adbd; one built for Linux from
    Android's sources serves if it listens where the variable ``service_adb_tcp_port`` says, as
    Android's property of that name does. ``DEPLOYKIT_TEST_ADBD`` names it.
    """
    adb = shutil.which("adb")
    if adb is None or ADBD is None:
        pytest.skip("no adb or adbd here (Debian: adb; DEPLOYKIT_TEST_ADBD names an adbd)")
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    daemon = subprocess.Popen(
        [ADBD, "--device_banner=device"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(folder / "adbd.log").open("wb"),
        env={**os.environ, "service_adb_tcp_port": str(port)},
    )
    serial = f"127.0.0.1:{port}"
    try:
        wait_for(port)
        said = ""
        for _ in range(50):
            subprocess.run([adb, "connect", serial], capture_output=True, check=False)
            state = [adb, "-s", serial, "get-state"]
            said = subprocess.run(state, capture_output=True, text=True, check=False).stdout
            if said.strip() == "device":
                break
            time.sleep(0.1)
        assert said.strip() == "device"
        yield AdbDevice(folder, serial, daemon)
    finally:
        daemon.kill()
        daemon.wait()
