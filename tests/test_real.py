"""Real weights and real images, which are not part of deploykit: DEPLOYKIT_REAL_DATA names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import deploykit

DATA = Path(os.environ.get("DEPLOYKIT_REAL_DATA", "/nonexistent"))
CHECKPOINT = DATA / "weights" / "dinov2_s_imagenette_168.safetensors"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not CHECKPOINT.exists(), reason="DEPLOYKIT_REAL_DATA has no such weights"),
]


def test_a_real_vit_keeps_its_accuracy_at_8_bits(tmp_path: Path) -> None:
    report = deploykit.compress(
        model="vit_small_patch14_dinov2",
        img_size=168,
        weights=CHECKPOINT,
        bits="w8a8",
        calib=DATA / "imagenette" / "train",
        data=DATA / "imagenette" / "val",
        out=tmp_path / "out",
    )
    (accuracy,) = report.accuracy
    assert accuracy.images == 1000
    assert accuracy.top1_original == pytest.approx(85.4, abs=0.3)
    assert accuracy.drop <= 0.5


def test_zero_channels_stay_alive_in_a_real_cnn(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    report = deploykit.compress(
        model="benchmarks.models:efficientnet_lite0",
        bits="w8a8",
        calib=DATA / "imagenet-sample",
        data=DATA / "imagenet-val",
        out=tmp_path / "out",
    )
    assert report.accuracy[0].drop <= 0.7
