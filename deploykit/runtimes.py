"""The runtimes' bad manners, mended: what they send when imported, what they leave behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from deploykit.errors import TargetMissingError, one_line

__all__ = ["import_onnxruntime", "import_openvino", "kept_signal_stack", "why_not"]

_OPENVINO_TELEMETRY = "openvino_telemetry"


def import_onnxruntime() -> Any:
    """The onnxruntime module, with its telemetry off.

    Official builds send events and write an id to the user's cache folder as soon as they are
    imported (Linux since 1.29), hence a variable set before; Windows builds have the function.

    Raises:
        TargetMissingError: onnxruntime is not installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        import onnxruntime
    except ImportError as error:
        message = f"onnxruntime cannot be imported ({one_line(error)}); pip install onnxruntime"
        raise TargetMissingError(message) from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def import_openvino() -> Any:
    """The openvino module, imported without its telemetry.

    Importing openvino sends an event and writes files to ~/intel unless its telemetry package
    cannot be imported, in which case it falls back to a stub that does nothing.

    Raises:
        TargetMissingError: openvino is not installed.
    """
    placeholder = _OPENVINO_TELEMETRY not in sys.modules
    if placeholder:
        sys.modules[_OPENVINO_TELEMETRY] = None  # type: ignore[assignment]  # makes its import fail
    try:
        import openvino
    except ImportError as error:
        message = (
            f"openvino cannot be imported ({one_line(error)}); "
            "pip install 'deploykit-vision[openvino]'"
        )
        raise TargetMissingError(message) from error
    finally:
        if placeholder:
            sys.modules.pop(_OPENVINO_TELEMETRY, None)
    return openvino


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Leave this thread's alternate signal stack as it was (Linux; elsewhere nothing is done).

    Each OpenVINO core that compiles for the CPU sets one of its own. Two of them, freed in the
    order they were made, leave the thread with the first one's, whose memory is gone; the next
    signal with a handler, such as Ctrl-C, then kills the process (seen with OpenVINO 2026.4).
    A stack that isn't in use any more is freed without harm.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    known = library.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            library.sigaltstack(ctypes.byref(before), None)


def why_not(load: Callable[[], object]) -> str | None:
    """None if a runtime can be imported, else the line that says why it can't."""
    try:
        load()
    except TargetMissingError as error:
        return str(error)
    return None
