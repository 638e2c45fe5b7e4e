"""An ONNX file, and a saved structure, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import deploykit
from deploykit.cli import main
from deploykit.errors import UsageError
from deploykit.export.onnx import onnx_bytes
from deploykit.export.structure import save_model
from deploykit.graph.capture import capture
from tests.graphs import make_backbone
from tests.onnx_files import write
from tests.tiny_models import SIZE, tiny_hybrid

QUICK = {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 0.3}
PREPROCESSING = {"size": SIZE, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny network as an ONNX file, and as a saved structure."""
    folder = tmp_path_factory.mktemp("files")
    model = capture(make_backbone(tiny_hybrid(), SIZE, classes=4))
    path = write(folder, onnx_bytes(model.graph_module, model.backbone))
    save_model(model.graph_module, model.backbone, folder, precision="fp32")
    return path, folder


def test_a_file_is_compressed_verified_and_measured(
    files: tuple[Path, Path], tiny_data: Path, tmp_path: Path
) -> None:
    report = deploykit.compress(
        {"measure": QUICK, "model": {"name": str(files[0]), "preprocessing": PREPROCESSING}},
        bits="w8a8",
        calib=tiny_data,
        data=tiny_data,
        out=tmp_path / "out",
    )
    (accuracy,) = report.accuracy
    assert accuracy.top1_original == 100  # the labels are the network's own answers
    assert all(row.passed for row in report.parity)
    assert report.compressed.bytes < report.original.bytes
    assert report.weights.kind == "file"
    assert report.compressed.weights == f"file: {files[0]}"
    assert "5.qkv" in {layer.layer for layer in report.layers}


def test_a_refused_file_leaves_nothing_behind(files: tuple[Path, Path], tmp_path: Path) -> None:
    path = write(tmp_path, files[0].read_bytes()[:1000], "cut.onnx")
    with pytest.raises(UsageError, match="cut short"):
        deploykit.compress({"model": {"name": str(path)}}, out=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["cut.onnx"]


@pytest.mark.parametrize("which", [0, 1])
def test_inspect_takes_both(
    which: int, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["inspect", str(files[which]), "--json"])
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["captured_ops"]["conv2d"] == 4
    assert found["captured_ops"]["group_norm"] == 1
    assert found["reach"]["quantised layers"]["reaches"] == 5
    assert found["weights"]["kind"] == ("file", "random")[which]
