"""One member of each kind of backbone through the whole pipeline, untrained. Minutes long."""

from __future__ import annotations

from pathlib import Path

import pytest

import deploykit

FAMILIES = [
    "sht_vit_s1",
    "deit_t",
    "swin_t",
    "convnext_t",
    "tinyvit_5m",
    "efficientformer_l1",
    "nextvit_s",
    "mobilenet_v2",
    "mobilevitv2_1.0",
    "pvt_v2_b0",
]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w8a8", "w4a4"])
@pytest.mark.parametrize("model", FAMILIES)
def test_every_kind_of_backbone_ships(model: str, bits: str, tmp_path: Path) -> None:
    report = deploykit.compress(
        {
            "verify": {"images": 8, "batch_sizes": [1, 4]},
            "measure": {"min_samples": 16, "min_seconds": 0.1, "max_seconds": 5.0},
        },
        model=model,
        weights="random",
        bits=bits,
        calib_images=16,
        out=tmp_path / "out",
    )
    assert all(row.passed for row in report.parity)
    assert report.compressed.bytes < report.original.bytes * (0.35 if bits == "w8a8" else 0.25)
    measured = report.find_measurement("compressed", "cpu-onnxruntime")
    assert measured is not None
    assert any(name.startswith("int8") for name in measured.kernels)
