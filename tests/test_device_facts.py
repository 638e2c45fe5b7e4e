"""What a measurement says of the machine: state, energy, driver, the precision that ran."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploykit.report import wording
from deploykit.targets.device import describe
from deploykit.targets.energy import NvmlMeter, RaplMeter, energy_of_a_call, find_rapl
from deploykit.targets.machine_state import StateFacts, read_state, throttled_between
from deploykit.targets.nvml import Gpu
from deploykit.targets.registry import get_target
from deploykit.targets.worker import ran_as
from deploykit.types import DeviceDescription, MachineState
from tests.factories import make_measurement
from tests.test_targets import save_tiny


def zone(powercap: Path, number: int, name: str, energy: int, turn: int = 1_000_000) -> Path:
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{turn}\n")
    return folder


def state(**facts: Any) -> StateFacts:
    empty = StateFacts(
        cpu_mhz=None, temperature_c=None, throttled=None, gpu_mhz=None, gpu_temperature_c=None,
        gpu_throttled=[], missing=[],
    )  # fmt: skip
    return {**empty, **facts}  # type: ignore[typeddict-item]


class NvmlError(Exception):
    pass


def fake_nvml() -> SimpleNamespace:
    """Answers as the library does; the board takes 300 W and its clock can't be read."""
    counter = iter(range(1000, 9000, 300))

    def no_clock(*_: object) -> int:
        raise NvmlError

    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlClocksThrottleReasonSwPowerCap=4,
        nvmlClocksThrottleReasonSwThermalSlowdown=32,
        nvmlDeviceGetName=lambda _: b"NVIDIA Test",
        nvmlDeviceGetCudaComputeCapability=lambda _: (9, 0),
        nvmlSystemGetDriverVersion=lambda: "550.1",
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(counter),
        nvmlDeviceGetClockInfo=no_clock,
        nvmlDeviceGetTemperature=lambda *_: 71,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 36,
    )


def test_rapl_adds_packages_and_survives_a_turn_of_the_counter(tmp_path: Path) -> None:
    first, second = zone(tmp_path, 0, "package-0", 900_000), zone(tmp_path, 1, "package-1", 5)
    zone(tmp_path, 2, "psys", 0)  # the whole machine: its packages would count twice
    meter, reason = find_rapl(tmp_path)
    assert isinstance(meter, RaplMeter)
    assert reason == ""
    (first / "energy_uj").write_text("100000")  # past its limit of a million
    (second / "energy_uj").write_text("50005")
    assert meter.rise_mj() == pytest.approx(200 + 50)
    assert meter.rise_mj() == 0


def test_energy_that_cannot_be_read_is_blank_with_a_reason(tmp_path: Path) -> None:
    assert find_rapl(tmp_path)[0] is None
    assert "no RAPL" in find_rapl(tmp_path)[1]
    (zone(tmp_path, 0, "package-0", 1) / "energy_uj").write_text("broken")
    meter, reason = find_rapl(tmp_path)
    assert meter is None
    assert "can't be read" in reason


def test_energy_of_a_call_is_the_rise_over_all_calls() -> None:
    now = {"s": 0.0, "mj": 7.0}

    class Meter:
        source = "test"
        last = 0.0

        def rise_mj(self) -> float:
            rise, self.last = now["mj"] - self.last, now["mj"]
            return rise

    def call() -> None:
        now["s"] += 0.125
        now["mj"] += 30.0

    assert energy_of_a_call(call, Meter(), 1.0, lambda: now["s"]) == pytest.approx(30)
    assert now["s"] == 1.0
    assert energy_of_a_call(call, Meter(), 0.0, lambda: now["s"]) == pytest.approx(30)
    assert now["s"] == 1.375  # three calls at least


def test_a_gpu_is_described_by_its_library() -> None:
    gpu = Gpu(fake_nvml(), object())
    facts = describe("cuda-x", "x 1", threads=1, cores=2, pinned_to=[0], gpu=gpu)
    assert facts["accelerator"] == "NVIDIA Test"
    assert facts["isa"][-1] == "sm_90"
    assert facts["drivers"] == {"nvidia": "550.1"}
    found = read_state([0], gpu)
    assert (found["gpu_mhz"], found["gpu_temperature_c"]) == (None, 71)
    assert found["gpu_throttled"] == ["power cap", "heat"]
    assert NvmlMeter(gpu).rise_mj() == 300


def test_a_cpu_target_says_nothing_of_a_gpu() -> None:
    facts = describe("cpu-x", "x 1", threads=1, cores=2, pinned_to=[0])
    assert facts["accelerator"] is None
    assert facts["drivers"] == {}
    assert not any(name.startswith("sm_") for name in facts["isa"])


def test_throttle_counts_are_read_and_compared(tmp_path: Path) -> None:
    for core, count in ((0, 3), (1, 4), (2, 100)):
        folder = tmp_path / f"cpu{core}" / "thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    assert read_state([0, 1], cpu_files=tmp_path)["throttled"] == 7
    blind = read_state([0, 1], cpu_files=tmp_path / "none")
    assert blind["throttled"] is None
    assert any(line.startswith("throttling") for line in blind["missing"])
    assert throttled_between(state(throttled=7), state(throttled=7)) is None
    assert "2 times" in (throttled_between(state(throttled=7), state(throttled=9)) or "")
    assert throttled_between(state(throttled=None), state(throttled=9)) is None
    assert "heat" in (throttled_between(state(), state(gpu_throttled=["power cap", "heat"])) or "")
    assert throttled_between(state(), state(gpu_throttled=["power cap"])) is None


def test_the_state_fits_the_report() -> None:
    found = MachineState.model_validate(read_state([0]))
    assert found.cpu_mhz is not None or any("clock" in line for line in found.missing)


@pytest.mark.parametrize(
    ("kernels", "floats", "expected"),
    [
        ({}, "float32", "float32"),
        ({"float Conv": 3}, "bfloat16", "bfloat16"),
        ({"int8 QLinearConv": 40, "float MatMul": 3}, "float32",
         "int8 in 40 of 43 kernels, float32"),
        ({"int4 dynamic Conv": 2, "int8 Conv": 1}, "float32",
         "int4 in 2 of 3 kernels, int8 in 1 of 3 kernels, float32"),
        ({"float linear": 4, "simulated fake_quantize": 9}, "float32, w8a8 simulated",
         "float32, w8a8 simulated"),
    ],
)  # fmt: skip
def test_what_really_ran(kernels: dict[str, int], floats: str, expected: str) -> None:
    assert ran_as(kernels, floats) == expected


def test_every_target_says_what_floats_are() -> None:
    assert get_target("cuda-torch").floats == "float16"
    assert get_target("coreml").floats == "as the file says"
    assert get_target("mobile-litert").floats == "float32"


def test_openvino_says_what_it_computes_in(tmp_path: Path) -> None:
    target = get_target("cpu-openvino")
    if (reason := target.available()) is not None:
        pytest.skip(reason)
    runner = target.load(save_tiny(tmp_path / "tiny.onnx"), 1)
    assert vars(runner)["precision"] == "float32"


def test_the_report_says_it_in_words() -> None:
    base = make_measurement().device
    device = DeviceDescription(
        **{
            **base.model_dump(),
            "accelerator": "NVIDIA Test",
            "drivers": {"nvidia": "550.1"},
            "before": {"cpu_mhz": 2000.0, "missing": ["temperature: no sensor"]},
            "after": {"cpu_mhz": 1900.0, "temperature_c": 60.0},
        }
    )
    seen = wording.machine(
        make_measurement(device=device, ran_as="float32", energy_mj=41.234, energy="RAPL")
    )
    assert seen == (
        "NVIDIA Test; nvidia driver 550.1; ran as float32; 2000 → 1900 MHz; "
        "no temperature: no sensor; 41.2 mJ a call (RAPL)"
    )
    assert wording.machine(make_measurement()) == ""
    assert wording.machine(make_measurement(energy="no RAPL")) == "no energy: no RAPL"
