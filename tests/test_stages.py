"""Pruned, merged, sparse, recovered: the steps before quantising, in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import deploykit
from deploykit.api import options_to_recipe
from deploykit.cli import _main
from deploykit.errors import UsageError
from deploykit.export.structure import load_model
from deploykit.prune import sparsity
from deploykit.recipe_io import build_recipe


@pytest.fixture
def options(tiny_options: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_options, "model": "tests.tiny_models:tiny_tokens"}


def test_every_step_is_a_file_that_is_verified_rated_and_timed(
    options: dict[str, Any], tmp_path: Path
) -> None:
    report = deploykit.compress(
        **options, tokens=8, sparsity="2:4", sparsity_method="magnitude", bits="w8a8",
        out=tmp_path / "out",
    )  # fmt: skip
    names = [a.name for a in report.artifacts]
    assert names == ["original", "merged", "sparse", "compressed"]
    assert {row.artifact for row in report.parity if row.passed} == set(names)
    assert [a.artifact for a in report.accuracy] == names[1:]
    assert [m.artifact for m in report.measurements] == names
    assert [record.name for record in report.passes[:2]] == ["merge_tokens", "sparsify"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Step by step" in page


def test_prune_alone_ships_floats_that_can_be_compressed_further(
    options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "pruned"
    report = deploykit.compress(**options, algorithm="none", tokens="8,0", out=out)
    assert [a.name for a in report.artifacts] == ["original", "compressed"]
    assert report.compressed.precision == report.bits == "fp32"
    assert load_model(out).precision == "fp32"
    again = deploykit.compress(
        **{**options, "model": str(out)}, bits="w8a8", out=tmp_path / "further"
    )
    assert again.exit_code == 0 and again.bits == "w8a8"


def test_a_resumed_run_goes_on_from_the_steps_that_are_done(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {**options, "tokens": 8, "sparsity": "2:4", "sparsity_method": "magnitude"}
    whole = deploykit.compress(**asked, out=tmp_path / "whole")

    real = sparsity.sparsify
    monkeypatch.setattr("deploykit.stages.sparsify", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        deploykit.compress(**asked, out=tmp_path / "out")
    monkeypatch.setattr("deploykit.stages.sparsify", real)
    monkeypatch.setattr("deploykit.stages.merge_tokens", _interrupt)  # it is done: not asked again
    resumed = deploykit.compress(**asked, out=tmp_path / "out", resume=True)
    assert resumed.compressed.sha256 == whole.compressed.sha256
    for name in ("structure.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _interrupt(*_: object, **__: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"algorithm": "none"}, "nothing to do"),
        ({"recover": "."}, "nothing to recover from"),
        ({"tokens": "many"}, "tokens must be none, auto, fast, a number"),
        ({"sparsity": "4:2"}, "n < m"),
        ({"prune": 1.0}, "at most 0.95"),
        ({"algorithm": "none", "bits": "w4a4", "tokens": 8}, "not for algorithm none"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_recipe(options_to_recipe(model="deit_tiny", **asked))


def test_a_model_with_too_few_tokens_is_refused_and_nothing_stays(
    tiny_options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["prune", "--model", "shvit_s1", "--weights", "random", "--img-size", "64"]
    assert _main([*command, "--tokens", "8", "-o", str(out)]) == 2
    assert "error:" in capsys.readouterr().err and not out.exists()


def test_the_command_prints_one_json_object(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"measure.{k}={v}" for k, v in options["recipe"]["measure"].items()]
    command = ["prune", "--model", options["model"], "--calib", str(options["calib"])]
    command += [part for text in settings for part in ("--set", text)]
    code = _main([*command, "--tokens", "fast", "-o", str(tmp_path / "out"), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report["bits"] == "fp32"


def test_pruned_and_recovered_in_one_run(options: dict[str, Any], tmp_path: Path) -> None:
    report = deploykit.compress(
        **options, algorithm="none", prune=0.3, tokens="8,0", recover=options["data"],
        recover_minutes=0.05, out=tmp_path / "out",
    )  # fmt: skip
    names = [record.name for record in report.passes]
    assert names == ["prune_structure", "merge_tokens", "recover"]
    assert [a.name for a in report.artifacts] == ["original", "pruned", "merged", "compressed"]
    assert report.compressed.bytes < 0.9 * report.original.bytes
    assert report.exit_code == 0


def test_tokens_are_chosen_on_calibration_images(options: dict[str, Any], tmp_path: Path) -> None:
    report = deploykit.compress(
        **options, algorithm="none", tokens="auto", max_drop=30.0, out=tmp_path / "out"
    )
    record = report.passes[0]
    assert record.name == "merge_tokens" and record.details["limit"] == 30.0
    assert "labels of" in record.details["judged_by"]
