"""``quantize.optimize_for`` from end to end: measured, decided, shipped, resumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest

import deploykit
from deploykit import optimize_for, pipeline
from deploykit.errors import TargetMissingError, UsageError
from deploykit.placement_search import STEP_NAME
from deploykit.profile import profile_source
from deploykit.report.html import render_html
from deploykit.report.markdown import render_markdown
from deploykit.report.model import Report, load_report
from deploykit.types import DeviceDescription, LayerProfile, LayerTime, Measurement

QUICK: dict[str, Any] = {
    "measure": {
        "min_samples": 16,
        "min_seconds": 0.05,
        "max_seconds": 0.2,
        "warmup_seconds": 0.05,
    },
    "calibration": {"images": 4, "batch_size": 4},
    "verify": {"images": 4, "batch_sizes": [1, 2]},
    "quantize": {"bits": "w8a8", "optimize_for": "cpu-onnxruntime", "optimize_rounds": 2},
}
TARGET = "cpu-onnxruntime"
DEVICE = DeviceDescription(
    target=TARGET, device="a CPU", cores=1, threads=1, pinned_to=[0], runtime="none", os="none"
)


def run(out: Path, **options: Any) -> Report:
    return deploykit.compress(QUICK, model="tests.tiny_models:tiny_hybrid", out=out, **options)


def fake_measure(ratios: Sequence[float]) -> Callable[..., list[Measurement]]:
    """Trials that take these shares of the float file's time, one after the other."""
    left = list(ratios)
    last = [1.0]

    def measure(_recipe: object, target: str, files: Any, *_: object) -> list[Measurement]:
        best, ratio = last[0], left.pop(0)
        last[0] = min(best, ratio)
        values = [1.0, ratio, best][: len(files)]
        return [
            Measurement(
                artifact=name, target=target, precision="", batch=1, samples=64, p50_ms=value,
                p50_low_ms=value, p50_high_ms=value, p90_ms=None, p99_ms=None, noisy=False,
                ratio=value, ratio_low=value, ratio_high=value, device=DEVICE,
            )
            for (name, _, _), value in zip(files, values, strict=True)
        ]  # fmt: skip

    return measure


def fake_profiles(slow: str) -> Callable[..., list[LayerProfile]]:
    """The original, and a file in which one layer takes twice as long and another one half."""

    def profile(name: str, times: dict[str, float]) -> LayerProfile:
        total = sum(times.values())
        rows = [
            LayerTime(layer=layer, kind="compute", kernel="k", op="Conv", precision="int8", ms=ms,
                      rounds_ms=[ms, ms], share=ms / total)
            for layer, ms in times.items()
        ]  # fmt: skip
        return LayerProfile(artifact=name, target=TARGET, total_ms=total, layers=rows)

    def profiles(_recipe: Any, _target: str, files: Any, *_: Any) -> list[LayerProfile]:
        times = [{slow: 1.0, "6": 8.0}, {slow: 2.0, "6": 4.0}]
        return [profile(file.name, one) for file, one in zip(files, times, strict=True)]

    return profiles


def test_it_measures_decides_and_says_so(tmp_path: Path) -> None:
    """All real; which way it goes is the machine's to say, but what is said must agree."""
    report = run(tmp_path / "out")
    (record,) = [record for record in report.passes if record.name == STEP_NAME]
    found = record.details
    assert record.summary in report.verdict_reasons
    assert 1 <= len(found["trials"]) <= 3
    assert found["trials"][0]["float_layers"] == []
    if found["quantise"]:
        assert report.compressed.precision == "w8a8"
        assert min(trial["ratio_high"] for trial in found["trials"]) <= 1
    else:
        assert report.compressed.precision == "fp32"
        assert "doesn't pay" in record.summary
    assert [one.artifact for one in report.layer_times] == ["original", "compressed"]
    for one in report.layer_times:
        assert sum(row.ms for row in one.layers) == pytest.approx(one.total_ms)
    assert all(row.passed for row in report.parity)
    assert load_report(tmp_path / "out") == report
    for text in (render_html(report), render_markdown(report)):
        assert f"Time by layer: compressed on {TARGET}" in text
    shown, verdict = profile_source(tmp_path / "out", TARGET, seconds=0.02)
    assert [one.artifact for one in shown] == ["original", "compressed"]
    assert "of its time" in verdict[0]


def test_a_layer_that_is_slower_ships_in_float(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize_for, "measure_as_asked", fake_measure([0.9, 0.5, 0.5]))
    monkeypatch.setattr(optimize_for, "_profiles", fake_profiles("5.qkv"))
    report = run(tmp_path / "out")
    (record,) = [record for record in report.passes if record.name == STEP_NAME]
    assert record.details["float_layers"] == ["5.qkv"]
    assert [trial["float_layers"] for trial in record.details["trials"]] == [[], ["5.qkv"]]
    assert "1 of" in record.summary
    graph = onnx.load(str(tmp_path / "out" / "model.onnx")).graph
    makers = {value: node.op_type for node in graph.node for value in node.output}
    nodes = {node.name: node for node in graph.node}
    assert makers[nodes["6"].input[0]] == "DequantizeLinear"
    assert makers.get(nodes["5.qkv"].input[0]) != "DequantizeLinear"
    assert makers.get(nodes["5.qkv"].input[1]) is None  # a float weight


def test_where_quantising_does_not_pay_the_float_file_ships_also_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimize_for, "measure_as_asked", fake_measure([1.5, 1.4]))
    monkeypatch.setattr(optimize_for, "_profiles", fake_profiles("5.qkv"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "check_parity", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out")
    monkeypatch.setattr(optimize_for, "measure_as_asked", interrupted)  # what is measured stays so
    report = run(tmp_path / "out", resume=True)
    assert report.compressed.precision == "fp32"
    assert report.bits == "fp32"
    assert any("quantisation doesn't pay on cpu-onnxruntime" in x for x in report.verdict_reasons)
    assert all(row.passed for row in report.parity)
    assert "QuantizeLinear" not in {
        node.op_type for node in onnx.load(str(tmp_path / "out" / "model.onnx")).graph.node
    }


def test_what_cannot_be_optimised_for_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"optimize_for: 'cpu-openvino' must be one of the targets"
    ):
        run(tmp_path / "out", optimize_for="cpu-openvino")
    with pytest.raises(UsageError, match=r"optimize_for: is not for algorithm nncf"):
        run(tmp_path / "out", algorithm="nncf")
    options = {**QUICK, "quantize": {"bits": "w8a8", "optimize_for": "mobile-ncnn"}}
    with pytest.raises((TargetMissingError, UsageError), match="ncnn"):
        deploykit.compress(
            options, model="tests.tiny_models:tiny_hybrid", out=tmp_path, targets=["mobile-ncnn"]
        )
    assert not (tmp_path / "out").exists()
