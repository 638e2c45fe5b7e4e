"""Processes in other environments: whatever they do, the caller gets an answer or one line."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploykit.errors import DeploykitError, TargetMissingError, UsageError
from deploykit.export.registry import get_exporter, list_exporters
from deploykit.targets import environments, host, registry
from deploykit.targets.environments import LIBRARIES, folder, missing
from deploykit.targets.host import Guest, call, guest_command
from deploykit.targets.isolated import IsolatedTarget, one_by_one
from deploykit.targets.measure import measure
from deploykit.targets.registry import get_target, list_targets, register_target

SERVING = (sys.executable, "-m", "deploykit.targets.serving")
FORMATS = {"executorch": "pte", "litert": "tflite", "ncnn": "ncnn"}


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No environment exists and our own has none of the libraries."""
    monkeypatch.setenv("DEPLOYKIT_ENVS", str(tmp_path / "envs"))
    monkeypatch.setattr(
        environments, "LIBRARIES", {name: (f"no_such_{name}",) for name in LIBRARIES}
    )
    return tmp_path / "envs"


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch, nowhere: Path) -> None:
    """An environment ``ncnn`` that is this one's Python without its packages' paths."""
    python = nowhere / "ncnn" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    pins = Path(environments.__file__).with_name("ncnn.requirements.txt")
    (nowhere / "ncnn" / "deploykit-pins.txt").write_bytes(pins.read_bytes())
    # the script is what another Python would run, with this one's site-packages
    monkeypatch.setattr(environments, "_python", lambda _: Path(sys.executable))


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "guest_script.py"
    path.write_text(textwrap.dedent(text))
    return (sys.executable, str(path))


# ── environments ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_missing_environment_is_one_line_with_the_command(name: str, nowhere: Path) -> None:
    reason = missing(name)
    assert reason is not None
    assert f"python -m deploykit.targets.environments {name}" in reason
    assert "\n" not in reason
    assert get_exporter(name).available() == reason
    assert get_target(f"mobile-{name}").available() == reason


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_using_a_missing_environment_is_exit_code_6(
    name: str, nowhere: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"model.{FORMATS[name]}"
    path.write_bytes(b"")
    target = get_target(f"mobile-{name}")
    for use in (
        lambda: target.load(path, 1),
        target.runtime,
        lambda: target.kernels(path),
        lambda: measure(f"mobile-{name}", [("original", path, "fp32")], input_shape=(3, 8, 8)),
    ):
        with pytest.raises(TargetMissingError, match="environments") as caught:
            use()
        assert caught.value.exit_code == 6
        assert "\n" not in str(caught.value)


def test_formats_and_targets_are_listed_whether_or_not_they_can_run(nowhere: Path) -> None:
    assert set(FORMATS) <= set(list_exporters())
    assert {f"mobile-{name}" for name in FORMATS} <= set(list_targets())


def test_an_environment_made_from_other_pins_is_not_used(ours: None, nowhere: Path) -> None:
    assert missing("ncnn") is None
    (nowhere / "ncnn" / "deploykit-pins.txt").write_text("ncnn==0.1\n")
    reason = missing("ncnn")
    assert reason is not None
    assert "other pins" in reason
    assert "environments ncnn" in reason


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_environment_pins_our_torch_and_its_libraries(name: str) -> None:
    text = Path(environments.__file__).with_name(f"{name}.requirements.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines
    assert sum("==" in line for line in lines) >= 2
    assert "://" not in text


def test_build_runs_venv_and_pip_and_marks_the_environment_last(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: Any) -> Done:
        assert not (nowhere / "ncnn" / "deploykit-pins.txt").exists()
        commands.append(command)
        folder("ncnn").mkdir(exist_ok=True)
        return Done()

    monkeypatch.setattr(environments.subprocess, "run", run)
    environments.build("ncnn")
    (venv, pip) = commands
    assert venv[1:3] == ["-m", "venv"]
    assert pip[1:5] == ["-m", "pip", "install", "-r"]
    assert Path(pip[0]).is_relative_to(nowhere / "ncnn")
    assert (nowhere / "ncnn" / "deploykit-pins.txt").is_file()


def test_build_reports_a_failed_pip_in_one_line(
    nowhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Done:
        returncode = 3

    monkeypatch.setattr(environments.subprocess, "run", lambda *_, **__: Done())
    assert environments.main(["ncnn"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (nowhere / "ncnn" / "deploykit-pins.txt").exists()
    assert environments.main(["tensorflow"]) == UsageError.exit_code
    assert "executorch, litert, ncnn" in capsys.readouterr().err


def test_build_leaves_a_folder_that_is_no_environment_alone(nowhere: Path) -> None:
    place = nowhere / "ncnn"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no virtual environment"):
        environments.build("ncnn")
    assert (place / "thesis.txt").exists()


# ── the conversation ──────────────────────────────────────────────────────────────────────────


def test_a_function_is_called_in_a_process_of_its_own(ours: None) -> None:
    assert call("ncnn", "os:getpid", 60) != os.getpid()


def test_the_guest_sees_our_package_and_nothing_else_of_our_path(
    ours: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('the user\\'s json.py was imported')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = guest_command("ncnn", "deploykit.targets.serving")
    assert command[1] == "-I"
    assert set(json.loads(command[3])) == {"deploykit", "deploykit.targets", "deploykit.export"}
    found = call("ncnn", "deploykit.targets.registry:list_targets", 60)
    assert "mobile-ncnn" in found


def test_an_error_of_the_function_keeps_its_kind_and_the_process_its_life() -> None:
    with Guest("ncnn", SERVING) as guest:
        request = {"do": "call", "arguments": {"name": "cpu-ncn"}}
        with pytest.raises(UsageError, match="unknown target 'cpu-ncn'; did you mean"):
            guest.ask({**request, "function": "deploykit.targets.registry:get_target"}, timeout=60)
        with pytest.raises(DeploykitError, match="ModuleNotFoundError: No module named 'nope'"):
            guest.ask({**request, "function": "nope:nothing"}, timeout=60)
        answer, array = guest.ask(
            {"do": "call", "function": "os:getpid", "arguments": {}}, timeout=60
        )
        assert answer["result"] != os.getpid()
        assert array is None


def test_what_libraries_print_is_not_taken_for_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "chatty.py"
    path.write_text("import os\ndef talk():\n    print('hello')\n    os.write(1, b'native')\n")
    command = (
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from deploykit.targets.serving import main; main()",
    )
    with Guest("ncnn", command) as guest:
        request = {"do": "call", "function": "chatty:talk", "arguments": {}}
        assert guest.ask(request, timeout=60)[0] == {"result": None}


BAD = {
    "import os; os._exit(3)": "the process of ncnn died (exit code 3)",
    "import sys; sys.exit('libncnn.so is broken')": "died (exit code 1): libncnn.so is broken",
    "import os; os.kill(os.getpid(), 11)": "the process of ncnn died (SIGSEGV)",
    "print('Segment 7 loaded')": "the process of ncnn sent something unreadable: b'Segment 7",
    "print('{}')": "the process of ncnn sent an answer without a result",
    "import os, time; os.close(1); time.sleep(600)": "the process of ncnn died (SIGKILL",
    "print('[1, 2]')": "sent something unreadable",
    "print('{\"bytes\": -5}')": "announced an answer of -5 bytes",
    "print('{\"bytes\": 99999999999}')": "announced an answer of 99999999999 bytes",
    'print(\'{"bytes": "many"}\')': "sent something unreadable",
    "print('{\"bytes\": 8}'); print('garbages', end='')": "sent an array that cannot be read",
    "print('{\"bytes\": 800}'); print('short')": "the process of ncnn died (exit code 0)",
}


@pytest.mark.parametrize("text", BAD)
def test_a_guest_that_misbehaves_is_one_line(text: str, tmp_path: Path) -> None:
    guest = Guest("ncnn", script(tmp_path, f"import sys; sys.stdin.readline()\n{text}"))
    with pytest.raises(DeploykitError) as caught:
        guest.ask_for("result", {"do": "call"}, timeout=60)
    assert BAD[text] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert guest._child.poll() is not None, "the process must be gone"
    with pytest.raises(DeploykitError, match="has ended already"):
        guest.ask({"do": "call"}, timeout=60)


def test_a_silent_guest_is_ended(tmp_path: Path) -> None:
    guest = Guest("ncnn", script(tmp_path, "import time; time.sleep(600)"))
    start = time.monotonic()
    with pytest.raises(DeploykitError, match=r"gave no answer for 0\.5 s and was ended"):
        # more than a pipe holds: a guest that doesn't read must not block us
        guest.ask({"do": "run"}, np.zeros((1, 3, 256, 256), np.float32), timeout=0.5)
    assert time.monotonic() - start < 60
    assert guest._child.poll() is not None


def test_a_guest_that_cannot_start_is_one_line() -> None:
    with pytest.raises(DeploykitError, match=r"cannot start the process of ncnn: .*no-such-python"):
        Guest("ncnn", ("/no-such-python", "x"))


def test_python_objects_are_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    text = f"""
        import sys; sys.stdin.readline()
        data = open({str(tmp_path / "objects.npy")!r}, "rb").read()
        sys.stdout.buffer.write(b'{{"bytes": %d}}\\n' % len(data) + data); sys.stdout.flush()
    """
    with (
        pytest.raises(DeploykitError, match="sent an array that cannot be read"),
        Guest("ncnn", script(tmp_path, text)) as guest,
    ):
        guest.ask({"do": "run"}, timeout=60)


@pytest.mark.skipif(sys.platform != "linux", reason="memory limits and signals of Linux")
def test_the_guest_s_memory_has_an_end(ours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_memory_limit", lambda: 2**29)
    with pytest.raises(DeploykitError, match="MemoryError"):
        call("ncnn", "numpy:zeros", 60, shape=[2**28])


# ── targets ───────────────────────────────────────────────────────────────────────────────────


def register_doubler(monkeypatch: pytest.MonkeyPatch) -> IsolatedTarget:
    monkeypatch.setattr(registry, "_REGISTRY", {**registry._REGISTRY})

    @register_target("cpu-doubler")
    class Doubler(IsolatedTarget):
        name: str
        formats = ("ncnn",)
        environment = "ncnn"

    return Doubler()


def test_a_target_s_runner_in_another_process(
    ours: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = register_doubler(monkeypatch)
    text = """
        import io, json, sys
        import numpy as np
        source, sink = sys.stdin.buffer, sys.stdout.buffer
        load = json.loads(source.readline())
        assert load["do"] == "load" and load["target"] == "cpu-doubler" and load["threads"] == 2
        sink.write(b'{"runner": 7}\\n'); sink.flush()
        while line := source.readline():
            header = json.loads(line)
            assert header["runner"] == 7
            images = np.load(io.BytesIO(source.read(header["bytes"])))
            file = io.BytesIO()
            np.save(file, 2 * images[:, 0, 0, :4])
            sink.write(b'{"bytes": %d}\\n' % len(file.getvalue()) + file.getvalue()); sink.flush()
    """
    command = script(tmp_path, text)
    monkeypatch.setattr("deploykit.targets.isolated.guest_command", lambda *_: command)
    path = tmp_path / "model.ncnn"
    path.mkdir()
    run = target.load(path, 2)
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    for count in (5, 1):
        np.testing.assert_array_equal(run(images[:count]), 2 * images[:count, 0, 0, :4])
    with pytest.raises(UsageError, match="no such file"):
        target.load(tmp_path / "other.ncnn", 1)


def test_one_by_one_is_a_batch_of_single_images() -> None:
    seen: list[tuple[int, ...]] = []

    def run(image: np.ndarray) -> np.ndarray:
        seen.append(image.shape)
        return image.sum((1, 2, 3))[:, None]

    images = np.arange(2 * 3 * 4 * 4, dtype=np.float32).reshape(2, 3, 4, 4)
    np.testing.assert_array_equal(one_by_one(run)(images), images.sum((1, 2, 3))[:, None])
    assert seen == [(1, 3, 4, 4)] * 2


def test_measuring_starts_the_measuring_process_where_the_runtime_is(
    ours: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So no pipe lies inside a timed call."""
    commands: list[Any] = []

    def ask(*_: Any, command: Any, **__: Any) -> dict[str, Any]:
        commands.append(command)
        raise DeploykitError("far enough")

    monkeypatch.setattr("deploykit.targets.place.ask", ask)
    path = tmp_path / "model.ncnn"
    path.mkdir()
    with pytest.raises(DeploykitError, match="far enough"):
        measure("mobile-ncnn", [("original", path, "fp32")], input_shape=(3, 8, 8))
    assert commands[0][-1] == "deploykit.targets.worker"
    assert Path(commands[0][2]).name == "guest.py"
