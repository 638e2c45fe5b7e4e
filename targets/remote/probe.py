"""Asked on the device: ``start.py deploykit.targets.remote.probe TARGET THREADS``.

One line of JSON: what is missing for the target, its runtime, and the cores to use. It imports
the runtime's helpers only when the packages that everything needs are there.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

from deploykit.targets.answering import end_with, private_stdout

__all__ = ["NEEDED", "main"]

NEEDED = {"numpy": "numpy", "psutil": "psutil", "cpuinfo": "py-cpuinfo"}
"""What every target needs on a device: module, and the package that has it."""


def main() -> int:
    """Answer on standard output; exit code 0."""
    answers = private_stdout()
    answers.write(json.dumps(_answer(sys.argv[1:])).encode("ascii") + b"\n")
    answers.flush()
    return 0


def _answer(arguments: list[str]) -> dict[str, Any]:
    missing = [package for module, package in NEEDED.items() if not _there(module)]
    if missing or not arguments:
        return {"missing": missing}
    from deploykit.errors import DeploykitError, one_line
    from deploykit.targets.device import allowed_cores, pick_cores
    from deploykit.targets.registry import get_target

    target = get_target(arguments[0])
    reason = target.available()
    runtime = ""
    if reason is None:
        try:
            runtime = target.runtime()
        except (DeploykitError, ImportError, OSError) as error:
            reason = one_line(error)
    return {
        "missing": [],
        "reason": reason,
        "runtime": runtime,
        "allowed": allowed_cores(),
        "picked": pick_cores(int(arguments[1])),
    }


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


if __name__ == "__main__":
    end_with(main)
