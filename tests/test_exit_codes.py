"""Every exit code of the README's table, provoked by a real command."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploykit.cli import _main, app
from deploykit.errors import ExitCode
from tests.factories import make_accuracy, make_measurement, make_parity, make_report

ROOT = Path(__file__).resolve().parent.parent
TINY = "tests.tiny_models:tiny_hybrid"
OFF_HERE = "cuda-tensorrt" if sys.platform == "darwin" else "coreml"


def table() -> dict[int, str]:
    """Code and meaning, as the README says."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = text[text.index("| exit code | meaning |") :].split("\n\n")[0].splitlines()[2:]
    return {int(code): meaning for _, code, meaning, _ in (r.split("|", 3) for r in rows)}


def test_the_table_has_every_code_and_no_other() -> None:
    assert list(table()) == [int(code) for code in ExitCode]
    epilog = app.info.epilog
    assert isinstance(epilog, str)
    said = {int(n) for n in re.findall(r"(?:^|[ :,])(\d+) [a-z]", epilog)}
    assert said == {int(code) for code in ExitCode}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run that loses a point and whose OpenVINO latency is noisy."""
    report = make_report(
        accuracy=[make_accuracy(drop=1.0)],
        measurements=[make_measurement(), make_measurement(target="cpu-openvino", noisy=True)],
    )
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    broken = report.model_copy(update={"parity": [make_parity(passed=False)]})
    (tmp_path / "parity.json").write_text(broken.to_json(), encoding="utf-8")
    return tmp_path


CHECKS: dict[ExitCode, Callable[[Path], list[str]]] = {
    ExitCode.OK: lambda run: ["check", str(run), "--max-drop", "5"],
    # a network that torch.export can't take through: nobody's input is at fault
    ExitCode.UNEXPECTED: lambda _: ["inspect", "tests.tiny_models:tiny_branching"],
    ExitCode.USAGE: lambda run: ["check", str(run / "nowhere")],
    ExitCode.ACCURACY: lambda run: ["check", str(run), "--max-drop", "0.5"],
    ExitCode.LATENCY: lambda run: ["check", str(run), "--max-ratio", "0.1"],
    ExitCode.PARITY: lambda run: ["check", str(run / "parity.json")],
    ExitCode.TARGET_MISSING: lambda run: [
        "compress", "--model", TINY, "--targets", OFF_HERE, "-o", str(run / "out")
    ],
    ExitCode.MEASUREMENT: lambda run: [
        "check", str(run), "--max-ratio", "9", "--targets", "cpu-openvino"
    ],
}  # fmt: skip
SLOW = {ExitCode.UNTRAINED, ExitCode.INTERRUPTED}


def test_every_code_is_provoked_here() -> None:
    assert CHECKS.keys() | SLOW == set(ExitCode)


@pytest.mark.parametrize("code", CHECKS)
def test_a_command_exits_with(code: ExitCode, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _main(CHECKS[code](run)) == code
    errors = capfd.readouterr().err.splitlines()
    said = [line for line in errors if line.startswith("deploykit: error:")]
    assert len(said) == (0 if code == ExitCode.OK else 1)
    assert not any("Traceback" in line for line in errors)


@pytest.mark.slow
def test_weights_that_nobody_has_are_exit_8(tmp_path: Path) -> None:
    options = ["--set", "measure.min_seconds=0.05", "--set", "measure.max_seconds=0.3",
               "--set", "measure.min_samples=16", "--set", "verify.images=8"]  # fmt: skip
    command = ["compress", "--model", "test_vit", "--bits", "8", "-o", str(tmp_path / "out")]
    assert _main([*command, *options]) == ExitCode.UNTRAINED
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.slow
def test_ctrl_c_is_exit_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploykit.cli", "compress", "--model", TINY]
    child = subprocess.Popen(
        [*command, "-o", str(tmp_path / "out")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    child.stderr.readline()  # it is at work
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == ExitCode.INTERRUPTED
    assert "--resume" in errors.splitlines()[-1]
