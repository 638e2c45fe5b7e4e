"""Make the project's own environment: ``python3 scripts/bootstrap.py [--extra test]``.

Needs nothing but Python and a network to the package index. What is there is reused: a stamp in
the environment says what was installed into it, and when that still holds nothing is done.

States of the environment's folder:

* ``deploykit-ready.json``: complete; holds the key of what was installed.
* ``deploykit-unfinished``: this script made the environment and an install did not end well, so
  it is deleted and made anew.
* neither: somebody else's environment. It is installed into, and never deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
VERSION = f"{OLDEST[0]}.{OLDEST[1]}+"
NEEDED = ("deploykit", "torch", "torchvision")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton", "pytorch-triton")
READY, UNFINISHED = "deploykit-ready.json", "deploykit-unfinished"
PROBE = (
    "import importlib.util, sys\n"
    "names = sys.argv[1:]\n"
    f"sys.exit(sys.version_info < {OLDEST} or not all(map(importlib.util.find_spec, names)))"
)


class BootstrapError(Exception):
    """Ends the script with one line."""


def say(text: str) -> None:
    print(f"bootstrap: {text}", flush=True)


# ── processes (tests replace these two) ───────────────────────────────────────────────────────


def capture(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run to the end and keep what it says."""
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=ROOT
    )


def follow(argv: Sequence[str], log: Path) -> int:
    """Run pip, write what it says to ``log``, and show what it is doing in a line."""
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=ROOT,
    )
    assert process.stdout is not None
    progress = Progress()
    try:
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                progress.show(line.strip())
        return process.wait()
    finally:
        progress.end()
        if process.poll() is None:
            process.terminate()
            process.wait()


class Progress:
    """On a terminal one line that changes; elsewhere a line every ten seconds."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.start = self.last = time.monotonic()

    def show(self, line: str) -> None:
        words = line.split()
        if not words or words[0] not in ("Collecting", "Downloading", "Installing", "Building"):
            return
        now = time.monotonic()
        text = " ".join(words[: 3 if words[0] == "Installing" else 2]).rstrip(":")
        if self.terminal:
            width = max(20, shutil.get_terminal_size().columns - 10)
            print(f"\r\033[K{now - self.start:4.0f} s  {text[:width]}", end="", flush=True)
        elif now - self.last >= 10:
            self.last = now
            say(f"{now - self.start:.0f} s: {text}")

    def end(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)


# ── the environment ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the stamps in it."""

    path: Path

    @property
    def python(self) -> Path:
        windows = os.name == "nt"
        return self.path / ("Scripts/python.exe" if windows else "bin/python")

    @property
    def ready(self) -> Path:
        return self.path / READY

    @property
    def unfinished(self) -> Path:
        return self.path / UNFINISHED

    def stamp(self) -> dict[str, Any]:
        """What the stamp says; empty when there is none that can be read."""
        try:
            found = json.loads(self.ready.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def works(self, *modules: str) -> bool:
        """Whether its Python starts, is new enough and finds the modules."""
        try:
            return capture([str(self.python), "-I", "-c", PROBE, *modules]).returncode == 0
        except OSError:
            return False

    def has_copy(self) -> bool:
        """Whether a plain ``pip install .`` put a copy there, which would hide later edits."""
        inside = ("lib/python3*/site-packages/deploykit", "Lib/site-packages/deploykit")
        return any(any(self.path.glob(pattern)) for pattern in inside)

    def remove(self) -> None:
        if self.path.is_symlink():
            message = f"{self.path} is a link: remove it, or give another place with --venv"
            raise BootstrapError(message)
        shutil.rmtree(self.path)

    def make(self) -> None:
        """An empty environment, marked unfinished from the first moment."""
        self.path.mkdir(parents=True)
        self.unfinished.touch()
        done = capture([sys.executable, "-m", "venv", str(self.path)])
        if done.returncode:
            said = done.stdout + done.stderr
            hint = last_line(said)
            if "ensurepip" in said:
                hint = "the venv module is incomplete; on Debian: apt install python3-venv"
            message = f"{sys.executable} could not make {self.path}: {hint}"
            raise BootstrapError(message)


def last_line(text: str) -> str:
    """The line that says why: pip's last ERROR, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no message"])[-1]


def key() -> str:
    """Changes when another install would be needed."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join([*parts, os.fsencode(ROOT)])).hexdigest()


def optional_parts() -> list[str]:
    """The extras of ``pyproject.toml``."""
    import tomllib  # not there before 3.11, and main() says so in one line

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return sorted(project.get("optional-dependencies", {}))


def pins(names: Sequence[str]) -> list[str]:
    """The lines ``name==version`` of the constraints file."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {line.partition("==")[0]: line for line in lines if "==" in line}
    return [found[name] for name in names]


# ── torch without CUDA ────────────────────────────────────────────────────────────────────────


def has_gpu() -> bool:
    """Whether an NVIDIA driver is there."""
    return shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*"))


def would_bring_cuda(environment: Environment, pair: Sequence[str]) -> bool:
    """Ask pip what the pair would bring, without downloading it."""
    done = capture([*pip(environment), "--quiet", "--dry-run", "--report", "-", *pair])
    try:
        report = json.loads(done.stdout)
        names = [str(item["metadata"]["name"]).lower() for item in report["install"]]
    except (ValueError, KeyError, TypeError):
        reason = last_line(done.stderr or done.stdout)
        message = f"pip cannot find {' and '.join(pair)}: {reason}"
        raise BootstrapError(message) from None
    return any(name.startswith(CUDA_PACKAGES) for name in names)


def torch_arguments(environment: Environment) -> list[str]:
    """What to hand to pip so that no CUDA comes to a machine that cannot use it."""
    pair = pins(["torch", "torchvision"])
    if not sys.platform.startswith("linux") or has_gpu():
        return pair
    if not would_bring_cuda(environment, pair):
        return pair
    say(f"no GPU here: torch and torchvision come from {CPU_INDEX}, without CUDA")
    return ["--extra-index-url", CPU_INDEX, *(f"{pin}+cpu" for pin in pair)]


def pip(environment: Environment) -> list[str]:
    command = [str(environment.python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    return [*command, "install", "-c", str(ROOT / "constraints.txt")]


# ── the whole ─────────────────────────────────────────────────────────────────────────────────


def bootstrap(folder: Path, extras: Sequence[str]) -> None:
    """Bring the environment to what ``pyproject.toml`` and ``constraints.txt`` say."""
    known = optional_parts()
    if unknown := sorted({*extras} - {*known}):
        message = f"pyproject.toml has no extra {unknown[0]!r}; it has {', '.join(known)}"
        raise BootstrapError(message)
    environment = Environment(folder)
    stamp = environment.stamp()
    wanted = sorted({*extras, *stamp.get("extras", [])})
    current = {"key": key(), "extras": wanted}
    whole = environment.works(*NEEDED) if stamp else True
    unchanged = current == {name: stamp.get(name) for name in current}
    if whole and unchanged and not environment.has_copy():
        say(f"{show(folder)} is up to date")
        return
    ours = prepare(environment, stamp, whole)
    environment.ready.unlink(missing_ok=True)
    if ours:
        environment.unfinished.touch()
    install(environment, wanted)
    environment.ready.write_text(json.dumps({**current, "ours": ours}), encoding="utf-8")
    environment.unfinished.unlink(missing_ok=True)
    say(f"{show(folder)} is ready")


def prepare(environment: Environment, stamp: dict[str, Any], whole: bool) -> bool:
    """Make an environment that pip runs in; True if this script made it."""
    path = environment.path
    if path.exists() or path.is_symlink():
        unfinished = environment.unfinished.exists()
        ours = unfinished or stamp.get("ours") is True
        if whole and not unfinished and environment.works("pip"):
            return ours
        if not ours:
            message = (
                f"{show(path)} is not this script's and has no Python {VERSION} with pip that "
                f"works: remove it, or give --venv FOLDER"
            )
            raise BootstrapError(message)
        say(f"{show(path)} is {'unfinished' if unfinished else 'broken'}: making it anew")
        environment.remove()
    else:
        say(f"making {show(path)} with Python {sys.version.split()[0]}")
    environment.make()
    return True


def install(environment: Environment, extras: Sequence[str]) -> None:
    """One install for everything: torch and torchvision must be chosen together."""
    project = f".[{','.join(extras)}]" if extras else "."
    arguments = torch_arguments(environment)
    say("installing the pinned packages (more than a gigabyte on disk; minutes the first time)")
    log = environment.path / "deploykit-install.log"
    if follow([*pip(environment), *arguments, "-e", project], log):
        reason = last_line(log.read_text(encoding="utf-8", errors="replace"))
        message = f"the install failed: {reason} (all of pip's output: {show(log)})"
        raise BootstrapError(message)
    if not environment.works(*NEEDED):
        message = f"pip was content, but {' or '.join(NEEDED)} cannot be found (see {show(log)})"
        raise BootstrapError(message)


def show(path: Path) -> str:
    """A path as the user would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def stop(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the project's own environment, or reuse it.")
    parser.add_argument("--extra", action="append", default=[], help="an extra of pyproject.toml")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="default: .venv")
    options = parser.parse_args(argv)
    if sys.version_info < OLDEST:
        say(
            f"Python {VERSION} is needed, {sys.executable} is "
            f"{sys.version.split()[0]}: make PYTHON=python3.12 names another one"
        )
        return 1
    signal.signal(signal.SIGTERM, stop)
    try:
        bootstrap(options.venv.absolute(), options.extra)
    except BootstrapError as error:
        say(str(error))
        return 1
    except OSError as error:
        say(f"cannot go on: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run starts afresh")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
