"""The main job from end to end, on a model small enough for it."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import deploykit
from deploykit import fsio, latency, verify
from deploykit.artifacts import size_and_hash
from deploykit.errors import AccuracyGateError, ExitCode, ParityError, UsageError
from deploykit.quant import calibrate as calibrate_module
from deploykit.report.model import Report, load_report
from deploykit.targets.registry import Target

FILES = {
    "recipe.yaml",
    *("original.onnx", "model.onnx"),
    *("structure.json", "model.safetensors"),
    "report.json",
    "report.md",
    "report.html",
    "environment.json",
}
OPENVINO = {"original.xml", "original.bin", "model.xml", "model.bin"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("run") / "out"
    report = deploykit.compress(
        {"measure": {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3}},
        model="tests.tiny_models:tiny_hybrid",
        bits="w4a8",
        calib=tiny_data,
        data=tiny_data,
        targets=["cpu-onnxruntime", "cpu-openvino"],
        out=out,
    )
    return out, report


def test_it_leaves_exactly_its_files(finished: tuple[Path, Report]) -> None:
    assert {path.name for path in finished[0].iterdir()} == FILES | OPENVINO


def test_the_report_on_disk_is_the_report_returned(finished: tuple[Path, Report]) -> None:
    assert load_report(finished[0]) == finished[1]


def test_sizes_and_hashes_are_those_of_the_files(finished: tuple[Path, Report]) -> None:
    for artifact in finished[1].artifacts:
        companion = artifact.path.with_suffix(".bin")
        files = [artifact.path, *([companion] if artifact.format == "openvino" else [])]
        assert sum(file.stat().st_size for file in files) == artifact.bytes
        assert size_and_hash(files)["sha256"] == artifact.sha256
    assert finished[1].compressed.bytes < finished[1].original.bytes


def test_the_artefact_itself_was_asked(finished: tuple[Path, Report]) -> None:
    report = finished[1]
    assert [(a.format, a.target) for a in report.accuracy] == [
        ("onnx", "cpu-onnxruntime"),
        ("openvino", "cpu-openvino"),
    ]
    for accuracy in report.accuracy:
        assert accuracy.top1_original == 100  # the labels are the float model's answers
        assert accuracy.top1 >= 75
    assert {row.batch for row in report.parity} == {1, 8}
    assert {row.runtime for row in report.parity} == {"cpu-onnxruntime", "cpu-openvino"}
    assert all(row.passed for row in report.parity)


def test_integer_kernels_really_run(finished: tuple[Path, Report]) -> None:
    found = finished[1].find_measurement("compressed", "cpu-onnxruntime")
    assert found is not None
    assert found.kernels["int8 QLinearConv"] == 4
    assert found.kernels["int8 MatMulIntegerToFloat"] == 2
    assert set(found.kernels) <= {"int8 QLinearConv", "int8 MatMulIntegerToFloat", "float Gemm"}


def test_the_file_says_where_it_comes_from(finished: tuple[Path, Report]) -> None:
    model = onnx.load(finished[0] / "model.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["precision"] == "w4a8"
    assert facts["weights"].startswith("module:")
    assert len(facts["recipe_sha256"]) == 64


def test_the_saved_recipe_makes_the_same_bytes(
    finished: tuple[Path, Report], tmp_path: Path
) -> None:
    deploykit.compress(finished[0] / "recipe.yaml", out=tmp_path / "again")
    again = (tmp_path / "again" / "model.onnx").read_bytes()
    assert again == (finished[0] / "model.onnx").read_bytes()


def test_an_interrupted_run_goes_on_where_it_was(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latency, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            deploykit.compress(**tiny_options, out=out)
    first = (out / "model.onnx").read_bytes()
    assert not (out / "report.json").exists()

    with pytest.raises(UsageError, match="--resume"):
        deploykit.compress(**tiny_options, out=out)
    with pytest.raises(UsageError, match="another recipe"):
        deploykit.compress(**tiny_options, bits=4, out=out, resume=True)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("done before the interruption, done again")

    monkeypatch.setattr(calibrate_module, "collect_histograms", again)
    monkeypatch.setattr(verify, "top1_and_predictions", again)
    report = deploykit.compress(**tiny_options, out=out, resume=True)
    assert report.measurements
    assert (out / "model.onnx").read_bytes() == first
    assert {path.name for path in out.iterdir()} == FILES


def test_a_full_disk_leaves_nothing(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write = fsio.os.fsync

    def fsync(handle: int) -> None:
        full() if fsync.calls > 3 else write(handle)
        fsync.calls += 1

    fsync.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(fsio.os, "fsync", fsync)
    with pytest.raises(UsageError, match="No space left"):
        deploykit.compress(**tiny_options, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_never_overwritten(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("…", encoding="utf-8")
    with pytest.raises(UsageError, match="isn't empty"):
        deploykit.compress(**tiny_options, out=tmp_path)
    with pytest.raises(UsageError, match="no run of deploykit"):
        deploykit.compress(**tiny_options, out=tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_missed_parity_is_exit_5(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify.loaded

    def wrong(target: Target, path: Path, threads: int) -> Any:
        run = real(target, path, threads)
        return lambda images: run(images) * 1.5 if path.name == "model.onnx" else run(images)

    monkeypatch.setattr(verify, "loaded", wrong)
    with pytest.raises(ParityError, match="parity"):
        deploykit.compress(**tiny_options, out=tmp_path / "out")
    report = load_report(tmp_path / "out")
    assert (report.verdict, report.exit_code) == ("failed", ExitCode.PARITY)


def test_a_missed_gate_raises_after_the_report_is_written(
    tiny_options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify.paired_accuracy

    def worse(name: str, labels: Any, before: Any, after: Any, data: str) -> Any:
        return real(name, labels, before, (before + 1) % 4, data)

    monkeypatch.setattr(verify, "paired_accuracy", worse)
    with pytest.raises(AccuracyGateError, match="max_drop"):
        deploykit.compress(**tiny_options, max_drop=1.0, out=tmp_path / "out")
    assert load_report(tmp_path / "out").exit_code == ExitCode.ACCURACY


def test_untrained_weights_are_never_given_an_accuracy(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**tiny_options, "model": "sht_vit_s1", "img_size": 64}
    report = deploykit.compress(**options, out=tmp_path / "out")
    assert report.exit_code == ExitCode.UNTRAINED
    assert report.verdict == "not for deployment"
    assert report.accuracy == []
    assert all(artifact.weights == "untrained" for artifact in report.artifacts)
    assert all(row.passed for row in report.parity)
    facts = {e.key: e.value for e in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert facts["weights"] == "untrained"
    assert "untrained" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="needs trained weights"):
        deploykit.compress(**options, max_drop=1.0, out=tmp_path / "gated")
    assert not (tmp_path / "gated").exists()


def test_random_weights_on_request_are_no_failure(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**tiny_options, "model": "shvit_s1", "img_size": 64, "weights": "random"}
    report = deploykit.compress(**options, bits="w8a8", out=tmp_path / "out")
    assert (report.exit_code, report.verdict) == (0, "not for deployment")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["weights"]["kind"] == "random"


def test_sparsity_is_in_the_file_and_in_the_report(
    tiny_options: dict[str, Any], tmp_path: Path
) -> None:
    report = deploykit.compress(**tiny_options, sparsity="2:4", out=tmp_path / "out")
    assert report.passes[0].name == "sparsify"
    model = onnx.load(tmp_path / "out" / "model.onnx")
    codes = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    qkv = next(c for c in codes.values() if c.shape == (48, 16, 1, 1))
    groups = torch.from_numpy(qkv.reshape(48, 4, 4).astype("float32"))
    assert int((groups != 0).sum(-1).max()) == 2
