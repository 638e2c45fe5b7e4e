"""The smallest member of every family through capture, W8A8, W4A4, pruning, merging and timing.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --only shvit crate_t
    python benchmarks/zoo.py --shard 1/4
    python benchmarks/zoo.py --render

Untrained weights made lively: what is shown is whether a family can be captured, quantised,
exported and run by ONNX Runtime with the same answers at two batch sizes; not accuracy. Each
member runs in a process of its own, bounded in memory and time, so that none takes the others
down. Members that are done are passed over (``--again`` repeats them), those with a failure are
not; shards may run side by side. Writes ``benchmarks/results/zoo.json`` after each member, and
``docs/support-matrix.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import filelock

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.zoo_matrix import markdown  # noqa: E402  (the folder is found by the line above)
from deploykit.backbones.registry import BackboneSpec, families, squash  # noqa: E402
from deploykit.environment import environment  # noqa: E402
from deploykit.fsio import atomic_write_text  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
MATRIX = ROOT / "docs" / "support-matrix.md"
LARGEST = 120.0  # millions of parameters: above that a member isn't run unless it is named


def members() -> dict[str, BackboneSpec]:
    """The smallest member of each family, by family."""
    return {
        family: min(found, key=lambda spec: spec.params_m or 0.0)
        for family, found in sorted(families().items())
    }


def chosen(only: list[str], shard: str) -> dict[str, BackboneSpec]:
    """Members of the families or of the names given, and of those every n-th.

    Raises:
        ValueError: a name that no family or member has, or a shard that isn't ``i/n``.
    """
    found = members()
    if only:
        known = {squash(text): family for family, spec in found.items()
                 for text in (family, spec.name)}  # fmt: skip
        unknown = [name for name in only if squash(name) not in known]
        if unknown:
            raise ValueError(f"no family and no smallest member is called {', '.join(unknown)}")
        wanted = {known[squash(name)] for name in only}
        found = {family: spec for family, spec in found.items() if family in wanted}
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--shard wants i/n such as 1/4, not {shard!r}")
    names = list(found)[int(index) - 1 :: int(count)]
    return {family: found[family] for family in names}


def run_member(name: str, gigabytes: float, minutes: float) -> dict[str, Any]:
    """A member's cells from a process of its own; what was done before it ended is kept."""
    command = [sys.executable, "-m", "benchmarks.zoo_member", name, str(gigabytes)]
    began = time.monotonic()
    cells: dict[str, Any] = {}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(60 * minutes, stop)
    timer.start()
    errors: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    stream = process.stderr
    reader = threading.Thread(target=lambda: errors.append(stream.read()), daemon=True)
    reader.start()
    try:
        for line in process.stdout:
            if line.startswith('{"step"'):
                step = json.loads(line)
                cells[step["step"]] = step["cell"]
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
    reader.join(10)
    row: dict[str, Any] = {"cells": cells, "seconds": round(time.monotonic() - began, 1)}
    if late.is_set():
        row["ended"] = f"more than {minutes:g} minutes"
    elif process.returncode:
        told = ("".join(errors).strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        row["ended"] = told[:300]
    return row


def update(path: Path, family: str, row: dict[str, Any]) -> None:
    """Lay one row over the results in the file; shards may do so side by side."""
    with filelock.FileLock(path.with_suffix(".lock")):
        data = load(path)
        data["members"][family] = row
        data["members"] = dict(sorted(data["members"].items()))
        data["environment"] = environment()
        atomic_write_text(path, json.dumps(data, indent=1) + "\n")
    path.with_suffix(".lock").unlink(missing_ok=True)


def finished(row: dict[str, Any]) -> bool:
    """Whether a member came to its end, and each step to a file that agrees or to a reason."""
    cells = row["cells"].values()
    wrong = any("failed" in cell or cell.get("passed") is False for cell in cells)
    return "ended" not in row and not wrong


def load(path: Path) -> dict[str, Any]:
    """The results so far."""
    if not path.exists():
        return {"members": {}}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="families or members")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th family from the i-th")
    parser.add_argument("--again", action="store_true", help="run members that are done, too")
    parser.add_argument("--render", action="store_true", help="only write the matrix anew")
    parser.add_argument("--memory-gb", type=float, default=16.0, help="of a member's process")
    parser.add_argument("--minutes", type=float, default=30.0, help="a member may take")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--matrix", type=Path, default=MATRIX)
    args = parser.parse_args()
    try:
        wanted = chosen(args.only, args.shard)
    except ValueError as error:
        parser.error(str(error))
    for family, spec in {} if args.render else wanted.items():
        done = load(args.results)["members"].get(family)
        if done and done["name"] == spec.name and finished(done) and not args.again:
            continue
        row: dict[str, Any] = {"name": spec.name, "source": spec.source, "params_m": spec.params_m}
        if (spec.params_m or 0) > LARGEST and not args.only:
            row |= {
                "cells": {},
                "ended": f"not run: larger than {LARGEST:g} M; name it with --only",
            }
        else:
            row |= run_member(spec.name, args.memory_gb, args.minutes)
        update(args.results, family, row)
        sys.stderr.write(f"{family} ({spec.name}): {json.dumps(row)}\n")
    atomic_write_text(args.matrix, markdown(load(args.results), members()))


if __name__ == "__main__":
    main()
