"""Devices over ssh: a real sshd on this machine, real round trips, and everything going wrong."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.targets.measure import measure
from deploykit.targets.registry import get_target
from deploykit.targets.remote.address import parse
from deploykit.targets.remote.session import close_sessions, session_on
from tests.remote_devices import SshDevice, ssh_device
from tests.remote_models import SHAPE, tiny_onnx


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevice]:
    with ssh_device(tmp_path_factory.mktemp("ssh") / "device") as found:
        yield found


@pytest.fixture
def device(shared: SshDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshDevice]:
    """The device; afterwards nothing may be left on it."""
    monkeypatch.setenv("DEPLOYKIT_SSH_CONFIG", str(shared.folder / "config"))
    shared.settings()
    yield shared
    close_sessions()
    assert shared.left() == []


def address(device: SshDevice) -> object:
    return parse(device.target())[0]


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


# ── what works ────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_sent_once_and_computes_there_what_it_computes_here(
    device: SshDevice, tmp_path: Path
) -> None:
    path = tiny_onnx(tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((5, *SHAPE), dtype=np.float32)
    there = get_target(device.target())
    run = there.load(path, 64)  # more threads than the device has cores
    here = get_target("cpu-onnxruntime").load(path, 1)
    np.testing.assert_allclose(run(images), here(images), atol=1e-5)
    assert there.runtime() == get_target("cpu-onnxruntime").runtime()
    session = session_on(parse(device.target())[0])
    assert session.send(path) == session.send(path)
    assert len(list(device.tmp.glob("deploykit.*/files/*"))) == 2  # the package, the model
    modes = {file.stat().st_mode & 0o077 for file in device.tmp.rglob("*")}
    assert modes == {0}  # nobody else's business


@pytest.mark.slow
def test_latency_is_measured_on_the_device(device: SshDevice, tmp_path: Path) -> None:
    files = [tiny_onnx(tmp_path / f"{name}.onnx", seed) for seed, name in enumerate("ab")]
    target = device.target()
    seen: list[str] = []
    found = measure(
        target, [("original", files[0], "fp32"), ("compressed", files[1], "w8a8")],
        input_shape=SHAPE, min_samples=16, min_seconds=0.05, max_seconds=0.5, warmup_seconds=0.0,
        progress=lambda _, text: seen.append(text),
    )  # fmt: skip
    assert [one.artifact for one in found] == ["original", "compressed"]
    for one in found:
        assert one.target == one.device.target == target
        assert one.p50_ms > 0
        assert one.samples >= 16
        assert one.kernels == {"float Gemm": 1}
        assert one.peak_rss_bytes is not None
        assert len(one.device.pinned_to) == 1
    assert "loading" in seen
    assert not list(device.tmp.glob("deploykit.*/pids/*"))  # every process there has ended


@pytest.mark.slow
def test_two_files_of_equal_bytes_are_two_artefacts(device: SshDevice, tmp_path: Path) -> None:
    """The request must keep its length though the device holds one copy."""
    path = tiny_onnx(tmp_path / "model.onnx")
    place = get_target(device.target()).place  # type: ignore[attr-defined]
    request = {"mode": "memory", "artifacts": [str(path), str(path)], "threads": 1, "cores": [0]}
    with pytest.raises(MeasurementError, match="too many values to unpack"):  # of one artefact
        place.ask(request, silence_seconds=60.0)


# ── what goes wrong before anything runs ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": "stranger"}, "none of your keys is accepted there"),
        ({"known": "empty"}, "its host key is not known here"),
        ({"known": "other"}, "its host key is not the one known here"),
    ],
)
def test_keys_that_do_not_fit(device: SshDevice, change: dict[str, str], reason: str) -> None:
    stranger = (device.folder / "stranger.pub").read_text()
    (device.folder / "other").write_text(f"[127.0.0.1]:{device.port} {stranger}")
    device.settings(**change)
    found = get_target(device.target()).available()
    assert found is not None
    assert "\n" not in found
    assert reason in found
    assert not (device.folder / "empty").exists()  # the key was not accepted behind the user's back


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ssh://nobody.invalid/cpu-onnxruntime", "no such host"),
        ("ssh://127.0.0.1:1/cpu-onnxruntime", "nothing listens there"),
    ],
)
def test_devices_that_are_not_there(device: SshDevice, name: str, reason: str) -> None:
    found = get_target(name).available()
    assert found is not None
    assert reason in found


def test_a_device_without_that_python(device: SshDevice) -> None:
    found = get_target(device.target(python="/nowhere/python3")).available()
    assert found is not None
    assert "no /nowhere/python3 there" in found
    assert "?python=/path" in found


def test_a_python_without_the_packages_says_what_to_install(device: SshDevice) -> None:
    """An empty virtual environment: what a new board has."""
    python = device.folder / "bare" / "bin" / "python"
    if not python.exists():
        command = [sys.executable, "-m", "venv", "--without-pip", str(python.parent.parent)]
        subprocess.run(command, check=True)
    found = get_target(device.target(python=str(python))).available()
    assert found is not None
    assert found.endswith(f"{python} -m pip install numpy psutil py-cpuinfo onnxruntime")


def test_a_missing_runtime_is_exit_code_six(device: SshDevice, tmp_path: Path) -> None:
    path = tmp_path / "model.ncnn"
    path.mkdir()
    with pytest.raises(TargetMissingError, match="pip install ncnn") as caught:
        measure(device.target("mobile-ncnn"), [("original", path, "fp32")], input_shape=SHAPE)
    one_line(caught.value)
    assert caught.value.exit_code == 6


def test_a_full_device(device: SshDevice) -> None:
    full = device.folder / "full"
    full.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system of fixed size can be mounted here")
    try:
        name = f"{device.address}/cpu-onnxruntime?python={sys.executable}&tmp={full}"
        found = get_target(name).available()
        assert found is not None
        assert f"no space left in {full}; free some" in found
        with pytest.raises(UsageError, match="no space left"):
            get_target(name).runtime()
        close_sessions()
        assert list(full.iterdir()) == []
    finally:
        close_sessions()
        subprocess.run(["umount", str(full)], check=True)


def test_a_folder_that_cannot_be_written(device: SshDevice) -> None:
    name = f"{device.address}/cpu-onnxruntime?tmp={device.folder}/nowhere"
    found = get_target(name).available()
    assert found is not None
    assert "no folder can be made there" in found


# ── what goes wrong meanwhile ─────────────────────────────────────────────────────────────────


def test_a_cut_connection_ends_the_process_and_removes_the_folder(device: SshDevice) -> None:
    session = session_on(parse(device.target())[0])
    command, _ = session.start(["sh", "-c", "echo $$ > pid; sleep 100"])
    running = subprocess.Popen(command, stdout=subprocess.PIPE)
    pid = wait_for_text(Path(session.folder, "pid"))
    device.cut()
    assert running.wait(10) != 0
    assert device.left() == []
    assert ended(pid)
    assert session.lost()
    with pytest.raises(MeasurementError, match="the connection was lost") as caught:
        session.run(["true"])
    one_line(caught.value)
    assert session_on(session.address) is not session  # the next use connects anew


@pytest.mark.slow
def test_a_connection_cut_while_measuring_is_one_line(device: SshDevice, tmp_path: Path) -> None:
    path = tiny_onnx(tmp_path / "model.onnx")

    def cut(_: float, text: str) -> None:
        if text.startswith("warming up"):
            device.cut()

    with pytest.raises(MeasurementError, match="the connection was lost") as caught:
        measure(
            device.target(), [("original", path, "fp32")], input_shape=SHAPE, min_seconds=20.0,
            max_seconds=20.0, progress=cut,
        )  # fmt: skip
    one_line(caught.value)
    assert caught.value.exit_code == 7
    assert device.left() == []


def test_a_silent_device_is_given_up_and_its_process_ended(device: SshDevice) -> None:
    session = session_on(parse(device.target())[0])
    with pytest.raises(MeasurementError, match="no answer for 1 s"):
        session.run(["sleep", "100"], seconds=1.0)
    command, name = session.start(["sh", "-c", "echo $$ > pid; sleep 100"])
    running = subprocess.Popen(command, stdout=subprocess.PIPE)
    pid = wait_for_text(Path(session.folder, "pid"))
    session.stop(name)
    running.wait(10)
    assert ended(pid)
    assert not session.lost(0.0)


def test_a_frozen_server_is_given_up(device: SshDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that accepts and says nothing."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setattr("deploykit.targets.remote.ssh.Ssh.connect_seconds", 1.0)
        found = get_target(f"ssh://127.0.0.1:{mute.getsockname()[1]}/cpu-onnxruntime").available()
    assert found is not None
    assert "no answer for 1 s" in found


def test_what_is_killed_here_is_removed_there(device: SshDevice) -> None:
    """kill -9 leaves this side no time for anything."""
    script = (
        "import sys, time\n"
        "from deploykit.targets.remote.address import parse\n"
        "from deploykit.targets.remote.session import session_on\n"
        f"session_on(parse({device.target()!r})[0])\n"
        "print('open', flush=True)\n"
        "time.sleep(100)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    assert any(device.tmp.iterdir())
    child.kill()
    child.wait()
    assert device.left() == []


def test_ctrl_c_leaves_nothing_there(device: SshDevice) -> None:
    script = (
        "import sys\n"
        "from deploykit.targets.remote.address import parse\n"
        "from deploykit.targets.remote.session import session_on\n"
        f"session = session_on(parse({device.target()!r})[0])\n"
        "print('open', flush=True)\n"
        "session.run(['sh', '-c', 'echo $$ > pid; sleep 100'])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"open\n"
    (folder,) = device.tmp.iterdir()
    pid = wait_for_text(folder / "pid")
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=30)
    assert not folder.exists()  # removed before it ended, not by and by
    assert ended(pid)


def test_silence_for_minutes_counts_as_a_lost_network(device: SshDevice) -> None:
    """The watch looks at the age of a file; its minutes are made seconds here."""
    from deploykit.targets.remote import scripts

    quick = scripts.KEEPER.replace("sleep 60", "sleep 0.2").replace(
        "-mmin -4", "-newermt '-1 second'"
    )
    assert quick.count("0.2") == 1
    assert quick.count("newermt") == 1
    keeper = subprocess.Popen(
        ["sh", "-c", quick, "deploykit", str(device.tmp)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert keeper.stdin is not None
    for _ in range(8):  # signs of life keep it
        keeper.stdin.write(b"\n")
        keeper.stdin.flush()
        time.sleep(0.2)
    assert keeper.poll() is None
    assert keeper.wait(10) != 0  # silence ends it
    assert device.left() == []


def test_a_tampered_file_is_refused(device: SshDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a connection cut in the middle of a file would leave."""
    session = session_on(parse(device.target())[0])
    monkeypatch.setattr("deploykit.targets.remote.session.pack", lambda *_: "0" * 64)
    with pytest.raises(MeasurementError, match="what arrived is not what was sent"):
        session.package()
    assert not list(Path(session.folder, "files").iterdir())


def ended(pid: str) -> bool:
    """Whether a process is gone, or a zombie that only waits to be counted."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def wait_for_text(path: Path) -> str:
    for _ in range(200):
        if path.exists() and (text := path.read_text().strip()):
            return text
        time.sleep(0.02)
    raise AssertionError(f"{path} was never written")
