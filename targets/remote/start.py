"""The first thing that a device's Python runs: ``python3 start.py MODULE [ARGUMENTS]``.

It lies in a folder that holds the parts of this package the device needs, which its place on the
module path makes importable. Old Pythons must be able to read it.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036  a device may have any
        sys.exit("Python %d.%d is too old; 3.10 or newer is needed" % sys.version_info[:2])  # noqa: UP031
    # a device has no environments beside its own Python
    os.environ["DEPLOYKIT_ON_DEVICE"] = "1"
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
