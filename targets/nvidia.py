"""The one place that imports TensorRT.

NVIDIA ships it twice with one API: ``tensorrt``, which builds on and for the GPU at hand, and
``tensorrt_rtx``, which also builds without a GPU, for GPUs that are named. The full library is
taken where both are installed and nothing else is asked for.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from deploykit.errors import TargetMissingError

__all__ = [
    "LIBRARIES",
    "build_obstacle",
    "find_libraries",
    "first_error",
    "gpu_missing",
    "make_logger",
    "tidy",
]

LIBRARIES = ("tensorrt", "tensorrt_rtx")

_INSTALL = (
    "pip install 'deploykit-vision[tensorrt-rtx]', or 'deploykit-vision[tensorrt]' with "
    "--extra-index-url set to NVIDIA's package index"
)
_DRIVERLESS = ("CUDA driver version is insufficient", "cudaErrorInsufficientDriver")
_KEPT = ("INTERNAL_ERROR", "ERROR", "WARNING")
_LIMIT = 300


def find_libraries(wanted: str | None = None) -> list[Any]:
    """The installed libraries' modules, the preferred one first; never empty.

    Args:
        wanted: ``tensorrt`` or ``tensorrt_rtx`` for that one only.

    Raises:
        TargetMissingError: none can be imported.
    """
    found, reasons = [], []
    for name in LIBRARIES if wanted is None else (wanted,):
        try:
            found.append(importlib.import_module(name))
        except (ImportError, OSError, RuntimeError) as error:  # wheels without their libraries
            reasons.append(tidy(str(error)))
    if not found:
        message = f"TensorRT cannot be imported ({'; '.join(reasons)}); {_INSTALL}"
        raise TargetMissingError(message)
    return found


def gpu_missing() -> str | None:
    """Why no NVIDIA GPU can be used, or None; asks the driver, so no CUDA package is needed."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return f"no NVIDIA driver is installed ({name} is not there)"
    count = ctypes.c_int(0)
    code = int(driver.cuInit(0)) or int(driver.cuDeviceGetCount(ctypes.byref(count)))
    if code:
        return f"the NVIDIA driver can't be used (CUDA error {code})"
    return None if count.value else "the NVIDIA driver finds no GPU"


def build_obstacle(library: Any) -> str | None:
    """Why a library can't build here, or None: the full one needs the GPU it builds for."""
    missing = None if hasattr(library, "ComputeCapability") else gpu_missing()
    if missing is None:
        return None
    return (
        f"{library.__name__} builds on the GPU that is to run the engine, and {missing}; use a "
        "machine with one, or pip install 'deploykit-vision[tensorrt-rtx]' and choose the library "
        "tensorrt_rtx"
    )


def make_logger(library: Any) -> Any:
    """A logger that prints nothing and keeps ``(severity, text)`` pairs in ``messages``."""

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            if severity.name in _KEPT:
                self.messages.append((severity.name, text))

    return Logger()


def first_error(messages: Sequence[tuple[str, str]], otherwise: str) -> str:
    """The first error that tells something, as one line."""
    errors = [text for severity, text in messages if severity.endswith("ERROR")]
    telling = [text for text in errors if not any(part in text for part in _DRIVERLESS)]
    return tidy((telling or errors or [otherwise])[0])


def tidy(text: str) -> str:
    """One line of at most 300 characters, without the library's own file names."""
    line = " ".join(re.sub(r"\(?In \w+ at /_src/\S+\)?", "", text).split())
    return line if len(line) <= _LIMIT else f"{line[: _LIMIT - 1]}…"
