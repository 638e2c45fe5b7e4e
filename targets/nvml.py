"""What NVIDIA's management library tells: GPU, driver, clocks, heat, energy.

Its Python bindings (``nvidia-ml-py``) are optional: without them those facts stay blank.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from deploykit.errors import one_line

__all__ = ["POWER_CAP", "Gpu", "find_gpu"]

POWER_CAP = "power cap"
_THROTTLES = {
    "nvmlClocksThrottleReasonSwPowerCap": POWER_CAP,
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "heat",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}


class Gpu:
    """One GPU, asked through the library's module ``nvml`` (``pynvml``), already initialised."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @property
    def name(self) -> str:
        return _text(self._nvml.nvmlDeviceGetName(self._handle))

    @property
    def architecture(self) -> str:
        """``sm_90``: what kernels there can be."""
        major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle)
        return f"sm_{major}{minor}"

    @property
    def driver(self) -> str:
        return _text(self._nvml.nvmlSystemGetDriverVersion())

    def energy_mj(self) -> float:
        """Millijoules since the driver was loaded, of the whole board. Volta and later."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))

    def state(self) -> dict[str, Any]:
        """Clock in MHz, degrees Celsius, and why the clock is lower than it could be."""
        nvml = self._nvml
        found: dict[str, Any] = {}
        with suppress(nvml.NVMLError):
            found["gpu_mhz"] = float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM))
        with suppress(nvml.NVMLError):
            found["gpu_temperature_c"] = float(
                nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)
            )
        with suppress(nvml.NVMLError):
            bits = int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
            found["gpu_throttled"] = [
                text for name, text in _THROTTLES.items() if bits & int(getattr(nvml, name, 0))
            ]
        return found


def find_gpu() -> tuple[Gpu | None, str]:
    """The GPU that CUDA calls the first, or None with the reason."""
    try:
        import pynvml as nvml
    except ImportError:
        return None, "pip install 'deploykit-vision[nvidia]' for the GPU's clocks, heat and energy"
    try:
        nvml.nvmlInit()
        return Gpu(nvml, _first(nvml, os.environ.get("CUDA_VISIBLE_DEVICES", ""))), ""
    except (nvml.NVMLError, OSError, ValueError) as error:
        return None, f"NVML doesn't tell of a GPU ({one_line(error)})"


def _first(nvml: Any, visible: str) -> Any:
    """CUDA may see fewer GPUs than the driver has, by number or by id."""
    chosen = visible.split(",")[0].strip()
    if chosen.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(chosen)
    return nvml.nvmlDeviceGetHandleByIndex(int(chosen or 0))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
