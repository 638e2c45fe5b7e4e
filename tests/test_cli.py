"""The command line: what a user types wrong, what a script reads, and every exit code."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from deploykit.cli import _main
from deploykit.errors import ExitCode
from deploykit.report.write import write_report
from tests.factories import make_accuracy, make_measurement, make_parity, make_report

TINY = "tests.tiny_models:tiny_hybrid"
FAST = [
    "--set", "measure.min_seconds=0.05", "--set", "measure.max_seconds=0.3",
    "--set", "measure.min_samples=16", "--set", "verify.images=8",
]  # fmt: skip


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every kind of bad input in it, as the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    (tmp_path / "truncated.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "empty").mkdir()
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (40, 40)).save(flat / "a.png")
    corrupt = tmp_path / "corrupt" / "0"
    corrupt.mkdir(parents=True)
    (corrupt / "a.png").write_bytes(b"not a picture")
    (tmp_path / "typo.yaml").write_text("model:\n  name: shvit_s1\nquantise:\n  bits: 4\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["compress", "--model", "shvitt_s4"], "nearest: shvit_s4"),
        (["compress", "--model", "shvit_s1", "--bits", "0"], "bits '0'"),
        (["compress", "--model", "shvit_s1", "--bits", "17"], "bits '17'"),
        (["compress", "--model", "shvit_s1", "--bits", "four"], "bits must be"),
        (["compress", "--bits", "4"], "model"),
        (["compress", "--model", TINY, "--calib", "missing"], "no such file or folder"),
        (["compress", "--model", TINY, "--calib", "empty"], "no images"),
        (["compress", "--model", TINY, "--data", "flat"], "without labels"),
        (["compress", "--model", TINY, "--calib", "corrupt"], "a.png"),
        (["compress", "--model", "shvit_s1", "--weights", "missing.pth"], "missing.pth"),
        (["compress", "--model", "shvit_s1", "--weights", "bomb.pth"], "bomb.pth"),
        (["compress", "--model", "shvit_s1", "--weights", "truncated.safetensors"], "truncated"),
        (["compress", "--recipe", "typo.yaml"], "typo.yaml:3"),
        (["compress", "--recipe", "typo.yaml"], "quantize"),
        (["compress", "--model", TINY, "--set", "quantize.bit=4"], "quantize.bits"),
        (["compress", "--model", TINY, "--max-drop", "1"], "--data"),
        (["compress", "--model", TINY, "--targets", "cpu-onnx"], "cpu-onnxruntime"),
        (["compress", "--model", TINY, "-o", "bomb.pth"], "got a file"),
        (["compress", "--model", TINY, "-o", "/proc/nowhere"], "/proc/nowhere"),
        (["compress", "--model", TINY, "--nonsense"], "--nonsense"),
        (["inspect", "shvitt_s4"], "nearest"),
        (["check", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], wanted: str, bad: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(bad.rglob("*"))
    assert _main(arguments) == ExitCode.USAGE
    output = capfd.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("deploykit: error:")]
    assert len(errors) == 1
    assert wanted in errors[0]
    assert "Traceback" not in output.err
    assert sorted(bad.rglob("*")) == before
    assert not (bad / "exploded").exists()


def test_json_is_the_last_line_and_everything_else_is_on_stderr(
    bad: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = _main(["compress", "--model", TINY, "--bits", "8", "-o", "out", "--json", *FAST])
    output = capfd.readouterr()
    assert code == 0
    (line,) = output.out.splitlines()
    assert json.loads(line)["verdict"] == "accuracy not measured"
    assert "Parity" in output.err


def test_help_and_no_arguments_explain_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    assert _main(["--help"]) == 0
    assert _main([]) == 0
    assert "compress" in capfd.readouterr().out


def test_list_finds_by_pattern(capfd: pytest.CaptureFixture[str]) -> None:
    assert _main(["list", "shvit", "--json"]) == 0
    names = {spec["name"] for spec in json.loads(capfd.readouterr().out)}
    assert names == {"shvit_s1", "shvit_s2", "shvit_s3", "shvit_s4"}
    assert _main(["list", "shvit"]) == 0
    assert "16.59" in capfd.readouterr().out


def test_inspect_says_what_each_technique_reaches(
    bad: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _main(["inspect", TINY, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["captured_ops"]["conv2d"] == 4
    assert found["reach"]["BatchNorm fold"]["reaches"] == 2
    assert found["reach"]["RepQ norm fold"]["reaches"] == 1
    merging = found["reach"]["token merging"]
    assert merging["reaches"] == 0 and "can't be merged" in merging["why"]
    assert _main(["inspect", TINY]) == 0
    assert "RepQ" in capfd.readouterr().out


def test_doctor_names_every_target(capfd: pytest.CaptureFixture[str]) -> None:
    assert _main(["doctor", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["targets"]["cpu-onnxruntime"] == "ok"
    assert _main(["doctor"]) == 0


@pytest.mark.parametrize(
    ("changes", "options", "code"),
    [
        ({}, ["--max-drop", "5"], ExitCode.OK),
        ({}, ["--max-drop", "0"], ExitCode.ACCURACY),
        ({}, ["--max-latency", "0.001"], ExitCode.LATENCY),
        ({}, ["--max-bytes", "10"], ExitCode.LATENCY),
        ({"parity": [make_parity(passed=False)]}, [], ExitCode.PARITY),
        ({"accuracy": []}, ["--max-drop", "1"], ExitCode.USAGE),
        (
            {"measurements": [
                make_measurement(artifact="original"),
                make_measurement(noisy=True),
            ]},
            ["--max-latency", "100"],
            ExitCode.MEASUREMENT,
        ),
    ],
)  # fmt: skip
def test_check_answers_with_its_exit_code(
    changes: dict[str, object],
    options: list[str],
    code: ExitCode,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    changes = {"accuracy": [make_accuracy(drop=1.0, lost=20, gained=0)], **changes}
    write_report(make_report(**changes), tmp_path)
    assert _main(["check", str(tmp_path), *options]) == code


def test_a_report_can_be_shown_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_report(make_report(), tmp_path / "a")
    assert _main(["report", str(tmp_path / "a"), "--markdown"]) == 0
    assert "| artefact |" in capfd.readouterr().out
    assert _main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "b")]) == 0
    assert (tmp_path / "b" / "report.html").exists()


def test_ctrl_c_leaves_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "deploykit.cli", "compress", "--model", TINY, "--bits", "4"]
    command += ["-o", str(tmp_path / "out"), *FAST]
    run = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "out" / "model.onnx").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == ExitCode.INTERRUPTED, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out" / "report.json").exists()
    again = subprocess.run(
        [*command, "--resume"], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert again.returncode == 0, again.stderr
    assert "calibrate" in again.stderr
    assert (tmp_path / "out" / "report.json").exists()
