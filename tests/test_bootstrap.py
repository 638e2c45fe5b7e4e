"""scripts/bootstrap.py with a pip that only writes down what it was asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bootstrap"] = module
    spec.loader.exec_module(module)
    return module


class Machine:
    """Replaces every process that bootstrap starts."""

    def __init__(self) -> None:
        self.cuda = False
        self.healthy = True
        self.exit_code = 0
        self.during_install: Callable[[], None] = lambda: None
        self.dry_runs: list[list[str]] = []
        self.installs: list[list[str]] = []
        self.venvs = 0

    def capture(self, argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        out, code = "", 0
        if "venv" in argv:
            self.venvs += 1
        elif "--dry-run" in argv:
            self.dry_runs.append(list(argv))
            names = ["torch", "torchvision", *(["nvidia-cublas", "triton"] if self.cuda else [])]
            out = json.dumps({"install": [{"metadata": {"name": name}} for name in names]})
        else:
            code = 0 if self.healthy else 1
        return subprocess.CompletedProcess(list(argv), code, out, "")

    def follow(self, argv: Sequence[str], log: Path) -> int:
        self.installs.append(list(argv))
        log.write_text("Collecting torch\nERROR: No matching distribution\nmore\n")
        self.during_install()
        return self.exit_code


class Bench:
    """A repository of two files, the script, and the machine it believes to run on."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.script = load()
        self.machine = Machine()
        (root / "pyproject.toml").write_text(
            "[project]\n[project.optional-dependencies]\ntest = []\nopenvino = []\n"
        )
        (root / "constraints.txt").write_text("# pins\ntorch==2.13.0\ntorchvision==0.28.0\n")
        self.patch = monkeypatch
        monkeypatch.setattr(self.script, "ROOT", root)
        monkeypatch.setattr(self.script, "capture", self.machine.capture)
        monkeypatch.setattr(self.script, "follow", self.machine.follow)
        monkeypatch.setattr(self.script, "has_gpu", lambda: False)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(self.script.signal, "signal", lambda *_: None)
        self.venv = root / ".venv"

    def run(self, *extras: str) -> int:
        options = [word for extra in extras for word in ("--extra", extra)]
        code: int = self.script.main(["--venv", str(self.venv), *options])
        return code

    @property
    def stamp(self) -> dict[str, Any] | None:
        path = self.venv / self.script.READY
        return json.loads(path.read_text()) if path.exists() else None


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_first_run_installs_everything_in_one_go_and_the_second_nothing(bench: Bench) -> None:
    assert bench.run("test") == 0
    (command,) = bench.machine.installs
    tail = command[command.index("install") :]
    constraints = str(bench.root / "constraints.txt")
    pair = ["torch==2.13.0", "torchvision==0.28.0"]
    assert tail == ["install", "-c", constraints, *pair, "-e", ".[test]"]
    assert bench.stamp is not None and bench.stamp["extras"] == ["test"]
    assert not (bench.venv / bench.script.UNFINISHED).exists()

    assert bench.run("test") == 0
    assert bench.run() == 0  # fewer extras than there are: nothing to do
    assert len(bench.machine.installs) == bench.machine.venvs == len(bench.machine.dry_runs) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_inputs_install_again_into_the_same_environment(bench: Bench, name: str) -> None:
    bench.run()
    path = bench.root / name
    path.write_text(path.read_text() + "# changed\n")
    assert bench.run() == 0
    assert (len(bench.machine.installs), bench.machine.venvs) == (2, 1)


def test_a_further_extra_keeps_the_earlier_ones(bench: Bench) -> None:
    bench.run("test")
    bench.run("openvino")
    assert bench.machine.installs[-1][-1] == ".[openvino,test]"
    bench.run("test")
    assert len(bench.machine.installs) == 2


def test_an_extra_that_there_isnt_is_refused(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.run("tset") == 1
    assert "no extra 'tset'; it has openvino, test" in capsys.readouterr().out
    assert not bench.machine.installs and not bench.venv.exists()


def test_no_gpu_and_cuda_wheels_takes_the_cpu_builds(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.machine.cuda = True
    assert bench.run() == 0
    command = bench.machine.installs[0]
    assert command[command.index("--extra-index-url") + 1] == bench.script.CPU_INDEX
    assert {"torch==2.13.0+cpu", "torchvision==0.28.0+cpu"} <= set(command)
    assert len([line for line in capsys.readouterr().out.splitlines() if "no GPU" in line]) == 1


@pytest.mark.parametrize(("gpu", "platform"), [(True, "linux"), (False, "darwin")])
def test_with_a_gpu_or_off_linux_the_plain_build(bench: Bench, gpu: bool, platform: str) -> None:
    bench.machine.cuda = True
    bench.patch.setattr(bench.script, "has_gpu", lambda: gpu)
    bench.patch.setattr(sys, "platform", platform)
    assert bench.run() == 0
    assert bench.machine.dry_runs == []
    assert "torch==2.13.0" in bench.machine.installs[0]


def test_nvidia_smi_counts_as_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load()
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.has_gpu()


def test_a_failed_install_is_one_line_leaves_no_stamp_and_is_rebuilt(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.machine.exit_code = 1
    assert bench.run() == 1
    assert bench.stamp is None
    last = capsys.readouterr().out.splitlines()[-1]
    assert "ERROR: No matching distribution" in last and "deploykit-install.log" in last

    (bench.venv / "half").touch()
    bench.machine.exit_code = 0
    assert bench.run() == 0
    assert bench.machine.venvs == 2
    assert not (bench.venv / "half").exists()
    assert bench.stamp is not None


def test_an_interrupted_install_leaves_no_stamp_either(bench: Bench) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    bench.run()
    bench.machine.during_install = interrupt
    assert bench.run("test") == 130  # it was whole before, and is not known to be now
    assert bench.stamp is None
    bench.machine.during_install = lambda: None
    assert bench.run("test") == 0
    assert bench.machine.venvs == 2


def test_an_install_that_does_not_work_gets_no_stamp(bench: Bench) -> None:
    def spoil() -> None:
        bench.machine.healthy = False

    bench.machine.during_install = spoil
    assert bench.run() == 1
    assert bench.stamp is None


def test_a_broken_environment_is_rebuilt(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.run()

    def mend() -> None:
        bench.machine.healthy = True

    bench.machine.healthy = False
    bench.machine.during_install = mend
    assert bench.run() == 0
    assert bench.machine.venvs == 2
    assert "broken: making it anew" in capsys.readouterr().out


def test_a_folder_of_someone_else_is_never_deleted(bench: Bench) -> None:
    bench.venv.mkdir()
    (bench.venv / "thesis.tex").write_text("years of work")
    bench.machine.healthy = False
    assert bench.run() == 1
    assert (bench.venv / "thesis.tex").exists()

    bench.machine.healthy = True  # a working environment of the user's own: installed into
    assert bench.run() == 0
    assert bench.stamp is not None and bench.stamp["ours"] is False
    bench.machine.healthy = False
    assert bench.run() == 1
    assert (bench.venv / "thesis.tex").exists()
    assert bench.machine.venvs == 0


def test_a_plain_install_over_it_is_undone(bench: Bench) -> None:
    bench.run()
    (bench.venv / "lib/python3.11/site-packages/deploykit").mkdir(parents=True)
    assert bench.run() == 0
    assert (len(bench.machine.installs), bench.machine.venvs) == (2, 1)


def test_a_damaged_stamp_counts_as_none(bench: Bench) -> None:
    bench.run()
    (bench.venv / bench.script.READY).write_text("{")
    assert bench.run() == 0
    assert len(bench.machine.installs) == 2


def test_no_network_is_one_line(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
        if "--dry-run" in argv:
            said = "WARNING: Retrying\nERROR: No matching distribution found for torch==2.13.0\n"
            return subprocess.CompletedProcess(list(argv), 1, "", said)
        return bench.machine.capture(argv)

    bench.patch.setattr(bench.script, "capture", offline)
    assert bench.run() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "bootstrap: pip cannot find torch==2.13.0 and torchvision==0.28.0: "
        "ERROR: No matching distribution found for torch==2.13.0"
    )
    assert bench.stamp is None


def test_an_old_python_is_one_line(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.patch.setattr(bench.script, "OLDEST", (99, 0))
    bench.patch.setattr(bench.script, "VERSION", "99.0+")
    assert bench.run() == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "Python 99.0+ is needed" in lines[0]
    assert not bench.venv.exists()


def test_typecheck_names_the_real_files() -> None:
    path = ROOT / "scripts" / "typecheck.py"
    spec = importlib.util.spec_from_file_location("typecheck", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folders = module.package_folders()
    assert folders["deploykit/quant"] == "quant"
    said = "deploykit/quant/plan.py:8: error: x\ndeploykit/data.py:1: note: y\n"
    assert module.real_paths(said, folders) == (
        "quant/plan.py:8: error: x\ndeploykit/data.py:1: note: y\n"
    )
