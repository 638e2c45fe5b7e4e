"""Run one module of this package with another environment's Python.

``python -I guest.py '{"deploykit": "/folder", …}' MEMORY_BYTES MODULE [ARGUMENTS]``: the packages
named become importable from their folders, and nothing else of our environment does. The file
is run by its path and imports nothing but the standard library.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class Finder:
    """Finds the named packages in their folders."""

    def __init__(self, packages: Mapping[str, str]) -> None:
        self._packages = packages

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  the protocol's
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """The package's spec, or None for any other module."""
        if name not in self._packages:
            return None
        place = Path(self._packages[name])
        return importlib.util.spec_from_file_location(
            name, place / "__init__.py", submodule_search_locations=[str(place)]
        )


def limit_memory(limit: int) -> None:
    """Let allocations beyond ``limit`` bytes fail (0: no limit), where the system can do that."""
    if limit and sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def die_with_parent() -> None:
    """End at once when whoever started us ends, where the system can do that."""
    if sys.platform == "linux":
        import ctypes

        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def main() -> None:
    packages, limit, module, *rest = sys.argv[1:]
    sys.meta_path.insert(0, Finder(json.loads(packages)))
    limit_memory(int(limit))
    die_with_parent()
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
