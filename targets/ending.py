"""How a measuring process ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from deploykit.errors import MeasurementError, one_line

__all__ = ["end_with"]


def end_with(main: Callable[[], int]) -> NoReturn:
    """Run a measuring process's ``main`` and exit with its code; an error is one line."""
    try:
        code = main()
    except BrokenPipeError:  # whoever asked is gone
        code = 1
    except Exception as error:
        sys.stderr.write(f"{type(error).__name__}: {one_line(error)}\n")
        code = MeasurementError.exit_code
    sys.stdout.flush()
    os._exit(code)  # some runtimes hang or crash in their global destructors
