"""Environments beside ours, for runtimes whose pins would break the core install.

Each is an ordinary virtual environment, made on request from the pins in
``<name>.requirements.txt`` beside this file::

    python -m deploykit.targets.environments executorch

It lies in ``$DEPLOYKIT_ENVS/<name>``, or ``~/.cache/deploykit/envs/<name>``. A mark written last,
a copy of the pins, tells a finished environment from a broken or an outdated one.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from deploykit.errors import DeploykitError, TargetMissingError, UsageError

__all__ = ["LIBRARIES", "build", "folder", "here", "interpreter", "missing"]

LIBRARIES = {
    "executorch": ("executorch",),
    "litert": ("litert_torch", "ai_edge_litert"),
    "ncnn": ("ncnn", "pnnx"),
}
"""Modules by which an environment is recognised, by its name."""

_MARK = "deploykit-pins.txt"


def folder(name: str) -> Path:
    """Where the environment is, or would be."""
    base = os.environ.get("DEPLOYKIT_ENVS")
    root = Path(base).expanduser() if base else Path.home() / ".cache" / "deploykit" / "envs"
    return root.absolute() / name


def here(name: str) -> bool:
    """Whether this very process can import the environment's libraries, or is its Python."""
    if Path(sys.prefix) == folder(name):  # never start a guest from within it
        return True
    if "DEPLOYKIT_ON_DEVICE" in os.environ:  # a remote device has but one Python
        return True
    return all(importlib.util.find_spec(module) is not None for module in LIBRARIES[name])


def missing(name: str) -> str | None:
    """None if the libraries can be used, else one line that says how to get them."""
    if here(name):
        return None
    command = f"python -m deploykit.targets.environments {name}"
    mark = folder(name) / _MARK
    if not mark.is_file() or not _python(name).exists():
        return f"{name} runs in an environment of its own, which is not there; make it: {command}"
    if mark.read_text(encoding="utf-8") != _requirements(name).read_text(encoding="utf-8"):
        return f"the environment of {name} was made from other pins; make it again: {command}"
    return None


def interpreter(name: str) -> str:
    """The Python that has the environment's libraries: ours, or the environment's.

    Raises:
        TargetMissingError: neither has them.
    """
    reason = missing(name)
    if reason is not None:
        raise TargetMissingError(reason)
    return sys.executable if here(name) else str(_python(name))


def build(name: str) -> Path:
    """Make (or make anew) an environment; pip's output goes to the terminal.

    Raises:
        UsageError: no environment has that name.
        DeploykitError: venv or pip failed.
    """
    if name not in LIBRARIES:
        message = f"unknown environment {name!r}; there are: {', '.join(sorted(LIBRARIES))}"
        raise UsageError(message)
    place, pins = folder(name), _requirements(name)
    if place.exists() and not (place / "pyvenv.cfg").is_file() and any(place.iterdir()):
        message = f"{place} is no virtual environment; move it away first"
        raise UsageError(message)
    (place / _MARK).unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(place)], "venv")
    # one command for everything: pip must see torch's pin beside those of the others
    _run([str(_python(name)), "-m", "pip", "install", "-r", str(pins)], "pip")
    shutil.copyfile(pins, place / _MARK)
    return place


def _run(command: Sequence[str], what: str) -> None:
    code = subprocess.run(list(command), stdin=subprocess.DEVNULL, check=False).returncode
    if code != 0:
        message = f"{what} failed with exit code {code}; its own words are above"
        raise DeploykitError(message)


def _python(name: str) -> Path:
    windows = os.name == "nt"
    return folder(name).joinpath(*(("Scripts", "python.exe") if windows else ("bin", "python")))


def _requirements(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.requirements.txt")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: make the named environments."""
    parser = argparse.ArgumentParser(prog="python -m deploykit.targets.environments")
    parser.add_argument("names", nargs="+", metavar="NAME", help=", ".join(sorted(LIBRARIES)))
    try:
        for name in parser.parse_args(arguments).names:
            sys.stdout.write(f"{name}: {build(name)}\n")
    except DeploykitError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
