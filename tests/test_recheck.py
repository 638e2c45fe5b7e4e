"""``deploykit verify``: a finished run's files compared once more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import deploykit
from deploykit.cli import _main
from deploykit.errors import ExitCode


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    deploykit.compress(
        {"measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3}},
        model="tests.tiny_models:tiny_hybrid",
        bits="w8a8",
        calib=tiny_data,
        formats=["openvino"],
        out=out,
    )
    return out


def test_a_folder_is_verified_wherever_it_is(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(finished, moved)
    assert _main(["verify", str(moved), "--images", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The other format was quantised with another kind of grid; its graph isn't the saved one.
    assert {row["format"] for row in rows} == {"onnx"}
    assert {row["runtime"] for row in rows} >= {"cpu-onnxruntime"}
    assert {row["batch"] for row in rows} == {1, 8}
    assert all(row["passed"] for row in rows)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda out: (out / "model.onnx").unlink(), "isn't there"),
        (lambda out: (out / "model.onnx").write_bytes(b"other"), "sha256 differs"),
        (lambda out: (out / "structure.json").unlink(), "structure.json"),
        (lambda out: (out / "report.json").unlink(), "cannot read report"),
    ],
)
def test_what_is_missing_or_changed_is_one_line(
    finished: Path, tmp_path: Path, harm: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    harm(broken)
    assert _main(["verify", str(broken)]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
