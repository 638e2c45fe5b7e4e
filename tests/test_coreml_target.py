"""The Core ML target: what it says elsewhere than on a Mac, and what it does on one.

The framework is only on macOS, so a stand-in for coremltools plays its part here.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploykit.errors import MeasurementError, TargetMissingError, UsageError
from deploykit.targets import coreml
from deploykit.targets.coreml import CoremlTarget
from deploykit.targets.registry import get_target, list_targets

on_mac = platform.system() == "Darwin"


def test_the_target_is_found_by_name() -> None:
    assert "coreml" in list_targets()
    assert get_target("coreml").formats == ("mlpackage",)


@pytest.mark.skipif(on_mac, reason="this is a Mac")
def test_elsewhere_it_says_that_it_needs_a_mac(tmp_path: Path) -> None:
    target = CoremlTarget()
    reason = target.available()
    assert reason is not None and "macOS" in reason and "\n" not in reason
    for call in (
        target.runtime,
        lambda: target.load(tmp_path, 1),
        lambda: target.kernels(tmp_path),
    ):
        with pytest.raises(TargetMissingError, match="macOS"):
            call()


class MLNeuralEngineComputeDevice:
    pass


class MLCPUComputeDevice:
    pass


class FakeModel:
    """``MLModel`` that answers with the mean colours and refuses batches of 13."""

    def __init__(self, path: str, compute_units: str) -> None:
        if "broken" in path:
            message = "Error compiling model:\n no such operator"
            raise RuntimeError(message)
        self.units = compute_units
        self.inputs = [SimpleNamespace(name="image")] * (2 if "twoin" in path else 1)

    def get_spec(self) -> Any:
        outputs = [SimpleNamespace(name="logits")]
        return SimpleNamespace(description=SimpleNamespace(input=self.inputs, output=outputs))

    def get_compiled_model_path(self) -> str:
        return "model.mlmodelc"

    def predict(self, feed: dict[str, Any]) -> dict[str, Any]:
        if len(feed["image"]) == 13:
            message = "unlucky\nshape"
            raise RuntimeError(message)
        assert feed["image"].flags.c_contiguous and feed["image"].dtype == np.float32
        return {"logits": feed["image"].mean((2, 3), dtype=np.float64)}


def fake_plan(path: str, compute_units: str) -> Any:
    assert (path, compute_units) == ("model.mlmodelc", "CPU_AND_NE")
    names = ["ios17.conv", "ios17.conv", "ios17.relu", "ios16.matmul", "ios17.linear"]
    operations = [SimpleNamespace(operator_name=name) for name in names]
    block = SimpleNamespace(block=SimpleNamespace(operations=operations))
    devices = {"conv": MLNeuralEngineComputeDevice(), "matmul": MLCPUComputeDevice()}

    def usage(operation: Any) -> Any:
        device = devices.get(operation.operator_name.split(".")[1])
        return device and SimpleNamespace(preferred_compute_device=device)

    program = SimpleNamespace(functions={"main": block})
    return SimpleNamespace(
        model_structure=SimpleNamespace(program=program),
        get_compute_device_usage_for_mlprogram_operation=usage,
    )


@pytest.fixture
def a_mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake: Any = ModuleType("coremltools")
    fake.__version__ = "9.0"
    fake.ComputeUnit = SimpleNamespace(ALL="ALL", CPU_AND_NE="CPU_AND_NE")
    plan = SimpleNamespace(MLComputePlan=SimpleNamespace(load_from_path=fake_plan))
    fake.models = SimpleNamespace(MLModel=FakeModel, compute_plan=plan)
    monkeypatch.setitem(sys.modules, "coremltools", fake)
    monkeypatch.setattr(coreml.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coreml.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    yield fake


def package_folder(tmp_path: Path, name: str = "model") -> Path:
    path = tmp_path / f"{name}.mlpackage"
    path.mkdir()
    return path


def test_on_a_mac_it_predicts(a_mac: ModuleType, tmp_path: Path) -> None:
    target = CoremlTarget()
    assert target.available() is None
    assert target.runtime() == "Core ML of macOS 15.1 (all), coremltools 9.0"
    run = target.load(package_folder(tmp_path), 1)
    images = np.arange(24, dtype=np.float64).reshape(2, 2, 2, 3).transpose(0, 3, 1, 2)
    logits = run(images.astype(np.float32))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, images.mean((2, 3)))
    with pytest.raises(MeasurementError, match=r"Core ML failed on .*: unlucky shape"):
        run(np.zeros((13, 3, 2, 2), np.float32))


def test_on_a_mac_it_says_what_runs_where(a_mac: ModuleType, tmp_path: Path) -> None:
    kernels = CoremlTarget("cpu-neural-engine").kernels(package_folder(tmp_path))
    assert kernels == {"float neural-engine conv": 2, "float cpu matmul": 1, "unplanned linear": 1}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken", "cannot load it: Error compiling model: no such operator"),
        ("twoin", "wanted one input and one output, it has 2 and 1"),
        ("", "no such package"),
    ],
)
def test_what_core_ml_refuses_is_one_line(
    a_mac: ModuleType, tmp_path: Path, name: str, reason: str
) -> None:
    path = package_folder(tmp_path, name) if name else tmp_path / "absent.mlpackage"
    with pytest.raises(UsageError, match=reason) as info:
        CoremlTarget().load(path, 1)
    assert "\n" not in str(info.value)


def test_a_mac_without_coremltools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreml.platform, "system", lambda: "Darwin")
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert "deploykit-vision[coreml]" in (CoremlTarget().available() or "")
    with pytest.raises(TargetMissingError, match="pip install"):
        CoremlTarget().runtime()
