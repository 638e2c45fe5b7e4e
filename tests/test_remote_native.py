"""Devices without Python: a C program speaks for the runtime, over a real sshd or adbd."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploykit.errors import DeploykitError, MeasurementError, TargetMissingError, UsageError
from deploykit.targets.measure import measure
from deploykit.targets.registry import get_target, list_targets
from deploykit.targets.remote.session import close_sessions
from tests.remote_devices import SshDevice, adb_device, free_port, ssh_device
from tests.remote_models import CLASSES, SHAPE

SOURCE = Path(__file__).with_name("native_runner.c")
LITERT = next(name for name in list_targets() if name.endswith("-litert"))


def compiled(folder: Path, compiler: str, *options: str) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    program = folder / f"runner-{compiler}"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", *options, "-o", str(program)]
    subprocess.run([*command, str(SOURCE)], check=True)
    return program


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("runner"), "cc")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshDevice]:
    with ssh_device(tmp_path_factory.mktemp("ssh") / "device") as found:
        yield found


@pytest.fixture
def device(shared: SshDevice, monkeypatch: pytest.MonkeyPatch) -> Iterator[SshDevice]:
    monkeypatch.setenv("DEPLOYKIT_SSH_CONFIG", str(shared.folder / "config"))
    yield shared
    close_sessions()
    assert shared.left() == []


def name(device: SshDevice, runner: Path) -> str:
    return f"{device.address}/{LITERT}?tmp={device.tmp}&runner={runner}"


def model(path: Path, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """A file for the C program, its weights (features, classes) and its biases."""
    rng = np.random.default_rng(seed)
    features = int(np.prod(SHAPE))
    weight = rng.standard_normal((features, CLASSES)).astype("<f4")
    bias = rng.standard_normal(CLASSES).astype("<f4")
    path.write_bytes(f"{features} {CLASSES}\n".encode() + weight.tobytes() + bias.tobytes())
    return path, weight, bias


def quick(target: str, *files: Path, **options: object) -> object:
    given = {"min_samples": 16, "min_seconds": 1e-4, "max_seconds": 5e-4, "warmup_seconds": 0.0}
    artifacts = [(path.stem, path, "fp32") for path in files]
    return measure(target, artifacts, input_shape=SHAPE, **{**given, **options})  # type: ignore[arg-type]


def logits(target: str, path: Path, images: np.ndarray) -> np.ndarray:
    return get_target(target).load(path, 1)(images)


def test_logits_come_from_the_program(device: SshDevice, runner: Path, tmp_path: Path) -> None:
    path, weight, bias = model(tmp_path / "a.tflite")
    images = np.random.default_rng(1).standard_normal((7, *SHAPE), dtype=np.float32)
    found = logits(name(device, runner), path, images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, images.reshape(7, -1) @ weight + bias, rtol=1e-4, atol=1e-4)


def test_it_is_timed_on_the_device(device: SshDevice, runner: Path, tmp_path: Path) -> None:
    files = [model(tmp_path / f"{letter}.tflite", seed)[0] for seed, letter in enumerate("ab")]
    target = name(device, runner)
    found = quick(target, *files)
    assert [one.artifact for one in found] == ["a", "b"]  # type: ignore[attr-defined]
    for one in found:  # type: ignore[attr-defined]
        assert one.device.target == target
        assert one.device.runtime == "linear 1.0, float32"
        assert one.kernels == {"float Linear": 1}
        assert one.samples >= 16
        # 768 products take well under a millisecond; a trip to the device and back does not
        assert 0 < one.p50_ms < 1
        assert one.peak_rss_bytes > 100_000
        assert len(one.device.pinned_to) == 1


@pytest.mark.slow
def test_it_is_pinned_to_the_cores_that_were_chosen(
    device: SshDevice, runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program is a script here that writes down what it may run on."""
    seen = tmp_path / "seen"
    script = tmp_path / "runner"
    script.write_text(f'#!/bin/sh\ngrep Cpus_allowed_list /proc/self/status > {seen}\n'
                      f'exec {runner} "$@"\n')  # fmt: skip
    script.chmod(0o755)
    target = get_target(name(device, script))
    last = target.allowed_cores()[-1]  # type: ignore[attr-defined]
    monkeypatch.setattr(type(target), "pick_cores", lambda *_: [last])
    found = quick(target.name, model(tmp_path / "a.tflite")[0])
    assert found[0].device.pinned_to == [last]  # type: ignore[index]
    assert seen.read_text().split() == ["Cpus_allowed_list:", str(last)]


def test_an_emulated_program_computes_but_is_not_timed(device: SshDevice, tmp_path: Path) -> None:
    """An ARM program under qemu: its logits are right, its times would be qemu's."""
    if shutil.which("qemu-aarch64-static") is None:
        pytest.skip("no qemu-aarch64-static here (Debian: qemu-user-static)")
    arm = compiled(tmp_path, "aarch64-linux-gnu-gcc", "-static")
    script = tmp_path / "runner"
    script.write_text(f'#!/bin/sh\nexec qemu-aarch64-static {arm} "$@"\n')
    script.chmod(0o755)
    path, weight, bias = model(tmp_path / "a.tflite")
    images = np.random.default_rng(1).standard_normal((3, *SHAPE), dtype=np.float32)
    target = name(device, script)
    found = logits(target, path, images)
    np.testing.assert_allclose(found, images.reshape(3, -1) @ weight + bias, rtol=1e-4, atol=1e-4)
    with pytest.raises(MeasurementError, match="an emulator runs it") as caught:
        quick(target, path)
    assert caught.value.exit_code == 7


def test_what_the_program_refuses_is_one_line_with_our_path(
    device: SshDevice, runner: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken.tflite"
    path.write_text("no model")
    with pytest.raises(UsageError, match="it is no model of mine"):
        get_target(name(device, runner)).load(path, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#!/bin/sh\necho 'CANNOT LINK EXECUTABLE' >&2; exit 1\n", "CANNOT LINK EXECUTABLE"),
        ("#!/bin/sh\necho hello\n", "unreadable"),
        ("#!/bin/sh\necho '{}'\n", "doesn't describe itself"),
        ("\x7fELFnonsense", "exit code 126|exit code 127"),
    ],
)
def test_programs_that_are_no_runners(
    device: SshDevice, tmp_path: Path, text: str, reason: str
) -> None:
    import re

    program = tmp_path / "runner"
    program.write_text(text)
    program.chmod(0o755)
    found = get_target(name(device, program)).available()
    assert found is not None
    assert "\n" not in found
    assert re.search(reason, found)


def test_a_program_that_is_not_there(device: SshDevice, tmp_path: Path) -> None:
    target = name(device, tmp_path / "nothing")
    with pytest.raises(TargetMissingError, match="no program"):
        quick(target, model(tmp_path / "a.tflite")[0])


def test_a_program_that_falls_silent_is_ended(
    device: SshDevice, runner: Path, tmp_path: Path
) -> None:
    """It describes itself and then says nothing more."""
    program = tmp_path / "runner"
    program.write_text(f'#!/bin/sh\nread -r line\necho "$line" | {runner} serve\nexec sleep 100\n')
    program.chmod(0o755)
    with pytest.raises(DeploykitError, match="gave no answer for 1 s"):
        quick(name(device, program), model(tmp_path / "a.tflite")[0], silence_seconds=1.0)


@pytest.mark.slow
def test_a_phone_s_program_is_named_by_a_variable(
    runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free_port()))
    monkeypatch.setenv("DEPLOYKIT_ANDROID_RUNNER_LITERT", str(runner))
    path, weight, bias = model(tmp_path / "a.tflite")
    images = np.random.default_rng(1).standard_normal((7, *SHAPE), dtype=np.float32)
    with adb_device(tmp_path / "device") as phone:
        target = f"adb:{phone.serial}/{LITERT}?tmp={phone.tmp}"
        try:
            found = logits(target, path, images)
            timed = quick(target, path)
        finally:
            close_sessions()
        assert phone.left() == []
    subprocess.run(["adb", "kill-server"], capture_output=True, check=False)
    np.testing.assert_allclose(found, images.reshape(7, -1) @ weight + bias, rtol=1e-4, atol=1e-4)
    assert timed[0].p50_ms < 1  # type: ignore[index]
