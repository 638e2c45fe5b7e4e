"""Feature maps of real backbones, compressed from end to end (slow)."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest

import deploykit
from deploykit.report.model import Report

DATA = Path(os.environ.get("DEPLOYKIT_REAL_DATA", "/nonexistent"))
CHECKPOINT = DATA / "weights" / "dinov2_s_imagenette_168.safetensors"
QUICK = {"min_samples": 16, "min_seconds": 0.05, "max_seconds": 5.0}
TASKS = {
    # model, side of the image: channels, height and stride of its maps
    ("vit_tiny_patch16_224", 224): [(192, 14, 16)],
    ("swin_tiny_patch4_window7_224", 224): [
        (96, 56, 4), (192, 28, 8), (384, 14, 16), (768, 7, 32),
    ],
    ("tiny_vit_5m_224", 1024): [(64, 256, 4), (128, 128, 8), (160, 64, 16), (320, 32, 32)],
}  # fmt: skip


def run(tmp_path: Path, model: str, size: int, *targets: str, images: int) -> Report:
    return deploykit.compress(
        {
            "measure": QUICK,
            "verify": {"images": images, "batch_sizes": [1, 2]},
            "calibration": {"batch_size": 2},
        },
        model=model,
        weights="random",
        img_size=size,
        features=True,
        bits="w8a8",
        calib_images=images,
        targets=list(targets),
        out=tmp_path / "out",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), TASKS)
def test_a_task_model_s_backbone_goes_all_the_way(tmp_path: Path, model: str, size: int) -> None:
    wanted = TASKS[model, size]
    images = 2 if size > 512 else 8
    report = run(tmp_path, model, size, "cpu-onnxruntime", "cpu-openvino", images=images)
    assert [(one.channels, one.height, one.stride) for one in report.levels] == wanted
    names = [f"features_{number}" for number in range(len(wanted))]
    for name in ("original.onnx", "model.onnx"):
        outputs = onnx.load(tmp_path / "out" / name).graph.output
        assert [output.name for output in outputs] == names
        assert outputs[0].type.tensor_type.shape.dim[0].dim_param  # any batch
    rows = {(r.artifact, r.format, r.level, r.batch): r for r in report.parity}
    assert len(rows) == 2 * 2 * len(names) * 2
    assert all(row.passed for row in rows.values())
    assert {(f.format, f.level) for f in report.fidelity} == {
        (form, name) for form in ("onnx", "openvino") for name in names
    }
    assert all(row.sqnr_db > 10 for row in report.fidelity)
    assert report.accuracy == []
    assert report.compressed.bytes < 0.4 * report.original.bytes


@pytest.mark.realdata
@pytest.mark.skipif(not CHECKPOINT.exists(), reason="DEPLOYKIT_REAL_DATA has no such weights")
def test_maps_of_a_real_vit_stay_near_at_eight_bits(tmp_path: Path) -> None:
    report = deploykit.compress(
        {
            "measure": QUICK,
            "model": {"features": [5, 11]},
            "evaluation": {"images": 64},
            "gates": {"min_sqnr_db": 15},
        },
        model="vit_small_patch14_dinov2",
        img_size=168,
        weights=CHECKPOINT,
        bits="w8a8",
        calib=DATA / "imagenette" / "train",
        calib_images=32,
        data=DATA / "imagenette" / "val",
        out=tmp_path / "out",
    )
    assert report.verdict == "ok"
    assert [row.images for row in report.fidelity] == [64, 64]
    assert all(row.passed for row in report.parity)
