"""A realistic report, to be bent by tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from deploykit.report.model import LayerError, Report
from deploykit.types import (
    Accuracy,
    Artifact,
    DeviceDescription,
    GateResult,
    Measurement,
    ParityRow,
    PassRecord,
    Preprocessing,
    WeightsOrigin,
)

TARGET = "cpu-onnxruntime"


def make_artifact(**overrides: Any) -> Artifact:
    """The compressed file."""
    values: dict[str, Any] = {
        "name": "compressed",
        "format": "onnx",
        "path": Path("out/model.onnx"),
        "bytes": 9_120_345,
        "sha256": "5c" * 32,
        "precision": "w4a8",
        "weights": "hub: timm/shvit_s4.in1k",
        "integer": ["conv2d", "linear", "matmul"],
        "wider": ["weights: 4-bit on disk, 8-bit when computed"],
        "simulated": ["softmax: log-sqrt2 codes as floats"],
    }
    return Artifact(**(values | overrides))


def make_accuracy(**overrides: Any) -> Accuracy:
    """A drop of 0.35 points on 2000 images."""
    values: dict[str, Any] = {
        "artifact": "compressed",
        "data": "imagenette val",
        "images": 2000,
        "top1_original": 79.40,
        "top1": 79.05,
        "lost": 12,
        "gained": 5,
        "drop": 0.35,
        "drop_low": -0.05,
        "drop_high": 0.75,
        "simulated_top1": 79.10,
    }
    return Accuracy(**(values | overrides))


def make_measurement(**overrides: Any) -> Measurement:
    """4.4 ms beside the original's 10.4 ms."""
    p50 = overrides.get("p50_ms", 4.41)
    values: dict[str, Any] = {
        "artifact": "compressed",
        "target": TARGET,
        "precision": "w4a8",
        "batch": 1,
        "samples": 300,
        "p50_ms": p50,
        "p50_low_ms": p50 * 0.99,
        "p50_high_ms": p50 * 1.01,
        "p90_ms": p50 * 1.05,
        "p99_ms": None,
        "withheld": "p99 needs 662 samples, got 300",
        "noisy": False,
        "ratio": 0.424,
        "ratio_low": 0.415,
        "ratio_high": 0.433,
        "peak_rss_bytes": 61_000_000,
        "load_ms": 84.0,
        "device": DeviceDescription(
            target=overrides.get("target", TARGET),
            device="Intel Xeon 2.1 GHz",
            cores=2,
            threads=1,
            pinned_to=[1],
            isa=["avx2", "avx512_vnni"],
            governor=None,
            runtime="onnxruntime 1.23.0",
            os="Linux 6.1",
        ),
        "samples_ms": [
            p50 * (1 + 0.03 * math.sin(12.9 * i) + (0.3 if i % 97 == 0 else 0)) for i in range(300)
        ],
    }
    return Measurement(**(values | overrides))


def make_parity(**overrides: Any) -> ParityRow:
    """The file against the quantised graph."""
    values: dict[str, Any] = {
        "artifact": "compressed",
        "reference": "quantised graph",
        "runtime": "onnxruntime",
        "batch": 1,
        "images": 32,
        "data": "synthetic",
        "max_abs": 2.4e-4,
        "mean_abs": 1.1e-5,
        "sqnr_db": 71.3,
        "top1_agreement": 100.0,
        "tolerance": "SQNR of 40 dB: one rounding step of int8",
        "passed": True,
    }
    return ParityRow(**(values | overrides))


def make_report(**overrides: Any) -> Report:
    """A good run of shvit_s4 at w4a8; any field may be given instead."""
    original = make_artifact(
        name="original",
        path=Path("out/original.onnx"),
        bytes=66_140_000,
        precision="fp32",
        integer=[],
        wider=[],
        simulated=[],
    )
    float_time = make_measurement(
        artifact="original", precision="fp32", p50_ms=10.4, ratio=None, ratio_low=None,
        ratio_high=None, peak_rss_bytes=143_000_000,
    )  # fmt: skip
    values: dict[str, Any] = {
        "deploykit_version": "0.1.0",
        "command": "deploykit compress --model shvit_s4 --bits w4a8 --data val --max-drop 1.0",
        "started": "2030-01-02T03:04:05Z",
        "seconds": 312.4,
        "model": "shvit_s4",
        "parameters": 16_550_000,
        "macs": 986_000_000,
        "preprocessing": Preprocessing(
            size=256, crop_pct=0.875, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
        ),
        "weights": WeightsOrigin(kind="hub", source="timm/shvit_s4.in1k", sha256="ab" * 32),
        "bits": "w4a8",
        "calibration": "128 images of imagenette train",
        "verdict": "ok",
        "verdict_reasons": ["all limits hold", "2.36× faster and 7.25× smaller than the original"],
        "artifacts": [original, make_artifact()],
        "accuracy": [make_accuracy()],
        "parity": [make_parity(), make_parity(batch=8, max_abs=3.1e-4)],
        "measurements": [float_time, make_measurement()],
        "gates": [
            GateResult(
                name="max_drop",
                limit=1.0,
                value=0.35,
                passed=True,
                reason="−0.35 points, is within the limit of 1 points",
            )
        ],
        "layers": [
            LayerError(
                layer=f"stages.{i // 10}.blocks.{i % 10}.mixer.qkv.conv",
                op="conv2d",
                bits="w4a8" if i not in (0, 39) else "w8a8",
                sqnr_db=22 + 9 * math.sin(1.7 * i) - (6 if i == 17 else 0),
            )
            for i in range(40)
        ],
        "passes": [
            PassRecord(name="fuse batch norm", summary="47 folded", details={"folded": 47}),
            PassRecord(name="quantise", summary="89 layers at w4a8, 3 at w8a8"),
        ],
        "environment": {
            "python": "3.11.9",
            "cpu": {"model": "Intel Xeon", "cores": 2},
            "packages": {"torch": "2.13.0", "onnxruntime": "1.23.0"},
        },
        "recipe": {"version": 1, "model": {"name": "shvit_s4"}, "quantize": {"bits": "w4a8"}},
        "warnings": ["calibration used 128 images; 256 or more are steadier at 4 bits"],
    }
    return Report(**(values | overrides))
