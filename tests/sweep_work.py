"""A process for tests to kill: runs, or goes on with, a sweep of pretended trials.

python -m tests.sweep_work SPEC OUT WORKERS local|ray
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    from deploykit.progress import Reporter
    from deploykit.sweep.engines import Engine, LocalEngine, RayEngine
    from deploykit.sweep.run import run_sweep
    from deploykit.sweep.spec import load_sweep
    from tests.pretended_trial import WORK

    spec, out, workers, kind = sys.argv[1:]
    engine: Engine = (
        LocalEngine(int(workers), 1) if kind == "local" else RayEngine(None, int(workers), 1)
    )
    run_sweep(load_sweep(Path(spec)), Path(out), engine=engine, command="test", work=WORK,
              reporter=Reporter(quiet=True), resume=True)  # fmt: skip
    engine.close()


if __name__ == "__main__":
    main()
