"""One trial: ``compress`` in a process of its own, on cores of its own.

Whatever happens to the process (a crash, no memory left), the sweep gets one line. When the sweep
dies, however it dies, its trials die with it and leave what ``resume`` needs.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypedDict

from deploykit.errors import DeploykitError, ExitCode, UsageError, one_line
from deploykit.fsio import atomic_write_text

__all__ = ["COMPRESS", "TrialRequest", "compress_trial", "run_trial"]

_ANSWER_SECONDS = 0.2
_IMPORTS = ["deploykit.api", "torch.export", "torch._dynamo", "onnxscript", "onnxruntime"]

COMPRESS = "deploykit.sweep.trial:compress_trial"
"""What a trial's process calls with its request."""


class TrialRequest(TypedDict):
    """A trial to be run, as plain data: it may travel to another machine."""

    number: int
    recipe: dict[str, Any]
    out: str  # the trial's folder
    log: str
    threads: int  # physical cores it gets
    minutes: float | None
    command: str
    work: str  # module:function, from a request to fields of TrialResult


def run_trial(request: TrialRequest, stop: threading.Event | None = None) -> dict[str, Any]:
    """Carry out a trial and give fields of ``TrialResult``; a failure is one of them.

    Returns when the trial's process is gone. ``stop`` ends it early.
    """
    # A server that has the imports done: a trial starts in a moment, not after seconds.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(_IMPORTS if request["work"] == COMPRESS else [])
    started = time.time()
    ours, its = context.Pipe()
    Path(request["log"]).parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=_child, args=(json.dumps(request), its), daemon=False)
    process.start()
    its.close()
    try:
        answer = _answer(ours, process, request, stop)
    finally:
        ours.close()  # the process ends itself then
        process.join()
    return {"started": started, "ended": time.time(), "host": platform.node(), **answer}


def _answer(
    ours: Connection[Any, Any],
    process: Any,
    request: TrialRequest,
    stop: threading.Event | None,
) -> dict[str, Any]:
    minutes = request["minutes"]
    computing_since: float | None = None
    while True:
        if stop is not None and stop.is_set():
            return _failed("stopped", ExitCode.INTERRUPTED)
        if ours.poll(_ANSWER_SECONDS):
            try:
                message: dict[str, Any] = json.loads(ours.recv_bytes())
            except (EOFError, OSError):
                process.join()
                return _failed(_how_it_died(process.exitcode, Path(request["log"])))
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            computing_since = time.monotonic()  # it has its cores: waiting doesn't count
        late = computing_since is not None and minutes is not None
        if late and time.monotonic() - (computing_since or 0) > 60 * (minutes or 0):
            return _failed(f"took longer than trial_minutes, {minutes:g}")


def _failed(reason: str, code: int = ExitCode.UNEXPECTED) -> dict[str, Any]:
    return {"state": "failed", "reason": reason, "exit_code": int(code)}


def _how_it_died(code: int | None, log: Path) -> str:
    how = f"exit code {code}"
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            how = signal.Signals(-code).name
        if how == "SIGKILL":
            how += ", often for want of memory"
    try:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    except OSError:
        last = []
    return f"the trial's process died ({how})" + (f": {last[0].strip()[:200]}" if last else "")


def _child(text: str, connection: Connection[Any, Any]) -> None:
    """The trial's process."""
    request: TrialRequest = json.loads(text)
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own, with the processes that measure for it
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    finished = threading.Event()
    watch = threading.Thread(target=_die_with_the_sweep, args=(connection, finished), daemon=True)
    watch.start()
    try:
        result = _kept(request) or _keep(request, _on_own_cores(request, connection))
    except DeploykitError as error:
        result = _failed(one_line(error), error.exit_code)
    except MemoryError:
        result = _failed("out of memory")
    except Exception as error:  # a bug, or a library's: this trial's reason, not the sweep's end
        import traceback

        traceback.print_exc()
        result = _failed(f"{type(error).__name__}: {one_line(error)}")
    finished.set()
    connection.send_bytes(json.dumps({"result": result}).encode())


def _kept(request: TrialRequest) -> dict[str, Any] | None:
    """The result of a trial that was finished when the sweep was killed before it knew."""
    try:
        found: dict[str, Any] = json.loads(_result_file(request).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _keep(request: TrialRequest, result: dict[str, Any]) -> dict[str, Any]:
    if result["state"] == "complete":
        atomic_write_text(_result_file(request), json.dumps(result))
    return result


def _result_file(request: TrialRequest) -> Path:
    """Beside the trial's folder, whose name holds the recipe's hash."""
    return Path(f"{request['out']}.json")


def _die_with_the_sweep(connection: Connection[Any, Any], finished: threading.Event) -> None:
    """The sweep sends nothing; when its end closes, nobody waits for this trial any more."""
    with contextlib.suppress(EOFError, OSError):
        connection.recv_bytes()
    if finished.is_set():
        return
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _on_own_cores(request: TrialRequest, connection: Connection[Any, Any]) -> dict[str, Any]:
    from deploykit.targets.exclusive import MEASURE_LOCK, claim_cores, lock_folder

    os.environ[MEASURE_LOCK] = str(lock_folder() / "measure.lock")
    with claim_cores(request["threads"]) as cores:
        if torch := sys.modules.get("torch"):  # loaded by the server, which has all cores
            torch.set_num_threads(len(cores))
        connection.send_bytes(b'{"cores": true}')
        module, _, function = request["work"].partition(":")
        work = getattr(importlib.import_module(module), function)
        return {**work(request), "cores": cores}


def compress_trial(request: TrialRequest) -> dict[str, Any]:
    """Run, go on with, or only read the trial's run."""
    from deploykit.pipeline import run
    from deploykit.progress import Reporter
    from deploykit.recipe_io import build_recipe, dump_recipe
    from deploykit.report.model import load_report
    from deploykit.sweep.result import read_report

    out = Path(request["out"])
    if not out.parent.is_dir():
        raise UsageError(
            f"{out.parent}: not on this machine ({platform.node()}); "
            "a cluster needs an output folder that all its machines share"
        )
    recipe = build_recipe(request["recipe"])
    finished = (out / "report.json").exists() and not (out / ".work").exists()
    if finished and (out / "recipe.yaml").read_text(encoding="utf-8") == dump_recipe(recipe):
        return _complete(read_report(load_report(out)))

    def carry_out(resume: bool) -> dict[str, Any]:
        if out.exists() and not resume:
            shutil.rmtree(out)  # a trial's folder is the sweep's own
        report = run(
            recipe, out, command=request["command"], reporter=Reporter(), resume=resume
        )  # fmt: skip
        return _complete(read_report(report))

    if (out / ".work" / "run.json").exists():
        try:
            return carry_out(resume=True)
        except UsageError:  # of another version, or damaged: from the beginning, then
            pass
    return carry_out(resume=False)


def _complete(found: dict[str, Any]) -> dict[str, Any]:
    if found["exit_code"] == ExitCode.PARITY:
        return {**found, "state": "failed", "reason": "parity: the file isn't the graph's"}
    return {**found, "state": "complete"}
