"""A whole run on another device, and what doctor says of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deploykit
from deploykit.cli import _main
from deploykit.errors import UsageError
from deploykit.layer_latency import measure_layers
from deploykit.targets.cpu_onnxruntime import CpuOnnxRuntime
from deploykit.targets.remote.session import close_sessions
from tests.remote_devices import SshDevice, ssh_device
from tests.remote_models import tiny_onnx


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshDevice]:
    with ssh_device(tmp_path / "device") as found:
        monkeypatch.setenv("DEPLOYKIT_SSH_CONFIG", str(found.folder / "config"))
        yield found
        close_sessions()
        assert found.left() == []


@pytest.mark.slow
def test_a_run_verifies_rates_and_times_on_the_device(
    device: SshDevice, tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    target = device.target()
    report = deploykit.compress(**tiny_options, targets=[target], out=tmp_path / "out")
    assert {row.runtime for row in report.parity} == {target}
    assert all(row.passed for row in report.parity)
    assert {row.target for row in report.accuracy} == {target}
    assert {m.device.target for m in report.measurements} == {target}
    assert target.split("?")[0] in (tmp_path / "out" / "report.html").read_text().replace(
        "&#x2F;", "/"
    )
    assert not any(device.tmp.glob("deploykit.*/pids/*"))


def test_doctor_says_what_a_device_is_and_has(
    device: SshDevice, capfd: pytest.CaptureFixture[str]
) -> None:
    name = device.target(python=sys.executable)
    assert _main(["doctor", "--device", name, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["targets"] == {name: "ok"}
    state = found["device"]
    assert state["python"] == sys.version.split()[0]
    assert len(state["cores"]) >= 1
    assert state["free_bytes"] > 0
    assert state["memory_bytes"] > 0
    assert _main(["doctor", "--device", name]) == 0
    text = capfd.readouterr().out
    for fact in ("machine", "cores", "governor", "thermal", "free space"):
        assert fact in text


def test_doctor_of_all_targets_on_a_device(
    device: SshDevice, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["cpu-onnxruntime", "cpu-openvino"]
    monkeypatch.setattr("deploykit.device_check.list_targets", lambda: names)
    where = f"{device.address}?tmp={device.tmp}&python=/nowhere/python"
    assert _main(["doctor", "--device", where, "--json"]) == 0
    targets = json.loads(capfd.readouterr().out)["targets"]
    assert [key.split("?")[0] for key in targets] == [f"{device.address}/{name}" for name in names]
    assert all("no /nowhere/python there" in state for state in targets.values())


@pytest.mark.parametrize(
    ("name", "code"),
    [("ssh://127.0.0.1:1", 6), ("board", 2), ("ssh://-x", 2)],
)
def test_doctor_of_no_device(name: str, code: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert _main(["doctor", "--device", name]) == code
    text = capfd.readouterr().err
    assert text.startswith("deploykit: error: ")
    assert text.count("\n") == 1


def test_layers_are_not_timed_through_a_pipe() -> None:
    with pytest.raises(UsageError, match="on this machine only"):
        measure_layers([], target="ssh://nowhere.invalid/cpu-onnxruntime")


def test_a_device_without_onnx_doesn_t_say_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_onnx(tmp_path / "model.onnx")
    assert CpuOnnxRuntime().kernels(path) == {"float Gemm": 1}
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert CpuOnnxRuntime().kernels(path) == {}
