"""Devices over adb: a real adbd on this machine, real round trips, and everything going wrong."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploykit.errors import MeasurementError
from deploykit.targets.measure import measure
from deploykit.targets.registry import get_target
from deploykit.targets.remote.address import parse
from deploykit.targets.remote.session import close_sessions, session_on
from tests.remote_devices import AdbDevice, adb_device, free_port
from tests.remote_models import SHAPE, tiny_onnx


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """An adb server of the tests' own: the user's stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
        yield
        subprocess.run(["adb", "kill-server"], capture_output=True, check=False)


@pytest.fixture
def device(server: None, tmp_path: Path) -> Iterator[AdbDevice]:
    """A device; afterwards nothing may be left on it."""
    with adb_device(tmp_path / "device") as found:
        yield found
        close_sessions()
        assert found.left() == []


def test_a_file_computes_there_what_it_computes_here(device: AdbDevice, tmp_path: Path) -> None:
    path = tiny_onnx(tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((5, *SHAPE), dtype=np.float32)
    run = get_target(device.target()).load(path, 1)
    here = get_target("cpu-onnxruntime").load(path, 1)
    np.testing.assert_allclose(run(images), here(images), atol=1e-5)
    assert run(np.repeat(images, 400, axis=0)).shape == (2000, 4)  # megabytes, any byte in them


@pytest.mark.slow
def test_latency_is_measured_on_the_device(device: AdbDevice, tmp_path: Path) -> None:
    files = [tiny_onnx(tmp_path / f"{name}.onnx", seed) for seed, name in enumerate("ab")]
    found = measure(
        device.target(), [("original", files[0], "fp32"), ("compressed", files[1], "w8a8")],
        input_shape=SHAPE, min_samples=16, min_seconds=0.05, max_seconds=0.5, warmup_seconds=0.0,
    )  # fmt: skip
    assert [one.artifact for one in found] == ["original", "compressed"]
    assert {one.device.target for one in found} == {device.target()}
    assert all(one.p50_ms > 0 and one.kernels == {"float Gemm": 1} for one in found)


def test_a_device_that_vanishes_cleans_up_by_itself(device: AdbDevice) -> None:
    session = session_on(parse(device.target())[0])
    command, _ = session.start(["sh", "-c", "echo $$ > pid; sleep 100"])
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    time.sleep(0.3)
    device.vanish()
    running.wait(10)  # with code 0, as adb has it
    assert device.left() == []
    with pytest.raises(MeasurementError, match="the connection was lost"):
        session.run(["true"])
    found = get_target(device.target()).available()
    assert found is not None
    assert "\n" not in found
    assert f"adb:{device.serial}: " in found


@pytest.mark.slow
def test_a_device_that_vanishes_while_measuring_is_one_line(
    device: AdbDevice, tmp_path: Path
) -> None:
    path = tiny_onnx(tmp_path / "model.onnx")

    def vanish(_: float, text: str) -> None:
        if text.startswith("warming up"):
            device.vanish()

    with pytest.raises(MeasurementError, match="the connection was lost") as caught:
        measure(
            device.target(), [("original", path, "fp32")], input_shape=SHAPE, min_seconds=20.0,
            max_seconds=20.0, progress=vanish,
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert device.left() == []


def test_a_serial_number_that_is_not_there(device: AdbDevice) -> None:
    found = get_target("adb:R58M123ABC/cpu-onnxruntime").available()
    assert found is not None
    assert found.startswith("adb:R58M123ABC: adb devices doesn't list it")


def test_stopping_ends_the_process_on_the_device(device: AdbDevice) -> None:
    """adb's client being gone doesn't end what it started."""
    session = session_on(parse(device.target())[0])
    with session.process(["sh", "-c", "sleep 100"]) as command:
        running = subprocess.Popen(command, stdout=subprocess.PIPE)
        pids = Path(session.folder, "pids")
        for _ in range(100):
            if any(file.stat().st_size for file in pids.iterdir()):
                break
            time.sleep(0.02)
        (pid,) = (int(file.read_text().split()[1]) for file in pids.iterdir())
        running.kill()
        running.wait()
        assert Path(f"/proc/{pid}").exists()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.02)
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or " Z " in stat.read_text()
    assert list(pids.iterdir()) == []
