"""Every error a user can meet, each with its exit code.

A message is one line: what was wanted, what came, how to mend it.
"""

from __future__ import annotations

import re
from enum import IntEnum

__all__ = [
    "AccuracyGateError",
    "DeploykitError",
    "ExitCode",
    "LatencyGateError",
    "MeasurementError",
    "ParityError",
    "TargetMissingError",
    "UsageError",
    "one_line",
    "root_cause",
]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class ExitCode(IntEnum):
    """Exit codes of the command line (documented in the README)."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    ACCURACY = 3
    LATENCY = 4
    PARITY = 5
    TARGET_MISSING = 6
    MEASUREMENT = 7
    UNTRAINED = 8
    INTERRUPTED = 130


class DeploykitError(Exception):
    """Base of all errors that are reported as one line instead of a traceback."""

    exit_code: ExitCode = ExitCode.UNEXPECTED


class UsageError(DeploykitError):
    """Bad input: an option, a recipe, a checkpoint, a data folder, an output path."""

    exit_code = ExitCode.USAGE


class AccuracyGateError(DeploykitError):
    """The artefact lost more accuracy than the gate allows."""

    exit_code = ExitCode.ACCURACY


class LatencyGateError(DeploykitError):
    """The artefact is slower than the gate allows."""

    exit_code = ExitCode.LATENCY


class ParityError(DeploykitError):
    """The file on disk does not compute what the quantised graph computes."""

    exit_code = ExitCode.PARITY


class TargetMissingError(DeploykitError):
    """A target's runtime, tool or device is not there."""

    exit_code = ExitCode.TARGET_MISSING


class MeasurementError(DeploykitError):
    """A measurement that something depends on is too noisy or too short to be used."""

    exit_code = ExitCode.MEASUREMENT


def root_cause(error: BaseException) -> BaseException:
    """The error that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of a runtime's error as one line of at most ``limit`` characters, uncoloured."""
    text = " ".join(_COLOUR.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
