"""Core ML on a Mac."""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploykit.errors import MeasurementError, TargetMissingError, UsageError, one_line
from deploykit.targets.registry import FloatArray, Runner, register_target

__all__ = ["ComputeUnit", "CoremlTarget", "import_coremltools", "quiet"]

ComputeUnit = Literal["all", "cpu", "cpu-gpu", "cpu-neural-engine"]

_UNITS = {
    "all": "ALL",
    "cpu": "CPU_ONLY",
    "cpu-gpu": "CPU_AND_GPU",
    "cpu-neural-engine": "CPU_AND_NE",
}
_LAYERS = ("conv", "linear", "matmul")


@register_target("coreml")
class CoremlTarget:
    """The Core ML framework through coremltools' ``predict``, which only macOS has.

    Args:
        units: the processors that Core ML may choose from; it decides operator by operator.
    """

    name: str
    formats: tuple[str, ...] = ("mlpackage",)
    exporter: str = "coreml"
    floats: str = "as the file says"

    def __init__(self, units: ComputeUnit = "all") -> None:
        self._units = units

    def available(self) -> str | None:
        """None, or that this isn't a Mac, or why coremltools cannot be imported."""
        if platform.system() != "Darwin":
            return f"Core ML runs on macOS only, this is {platform.system()}; run it on a Mac"
        try:
            import_coremltools()
        except TargetMissingError as error:
            return str(error)
        return None

    def runtime(self) -> str:
        """Name, version and the processors it may use; floats are what the file says."""
        self._require()
        system = platform.mac_ver()[0]
        version = import_coremltools().__version__
        return f"Core ML of macOS {system} ({self._units}), coremltools {version}"

    def kernels(self, path: Path) -> dict[str, int]:
        """Layers and matrix products by the processor that Core ML plans to run them on.

        The framework doesn't say whether that processor multiplies integers, so none is called
        ``int8``.

        Raises:
            TargetMissingError: this isn't a Mac, or coremltools is not installed.
        """
        self._require()
        ct = import_coremltools()
        model = self._model(path)
        plan = ct.models.compute_plan.MLComputePlan.load_from_path(
            path=model.get_compiled_model_path(), compute_units=self._unit(ct)
        )
        counts: Counter[str] = Counter()
        for operation in plan.model_structure.program.functions["main"].block.operations:
            kind = operation.operator_name.rpartition(".")[2]
            if kind not in _LAYERS:
                continue
            usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
            device = "unplanned" if usage is None else _device(usage.preferred_compute_device)
            counts[f"{device} {kind}"] += 1
        return dict(counts)

    def load(self, path: Path, threads: int) -> Runner:
        """A compiled model. Core ML has no setting for threads: ``threads`` is not used.

        Raises:
            TargetMissingError: this isn't a Mac, or coremltools is not installed.
            UsageError: the package is not there, or Core ML refuses it.
        """
        del threads
        self._require()
        model = self._model(path)
        description = model.get_spec().description
        if len(description.input) != 1 or len(description.output) != 1:
            message = f"{path}: wanted one input and one output, it has {len(description.input)} "
            message += f"and {len(description.output)}"
            raise UsageError(message)
        return _Model(model, description.input[0].name, description.output[0].name, path)

    def _require(self) -> None:
        reason = self.available()
        if reason is not None:
            raise TargetMissingError(reason)

    def _unit(self, ct: Any) -> Any:
        return getattr(ct.ComputeUnit, _UNITS[self._units])

    def _model(self, path: Path) -> Any:
        ct = import_coremltools()
        if not path.is_dir():
            message = f"{path}: no such package"
            raise UsageError(message)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)  # how it says that it failed
                return ct.models.MLModel(str(path), compute_units=self._unit(ct))
        except Exception as error:  # its exceptions share no base of their own
            message = f"{path}: Core ML cannot load it: {one_line(error)}"
            raise UsageError(message) from error


class _Model:
    def __init__(self, model: Any, input_name: str, output_name: str, path: Path) -> None:
        self._model = model
        self._input, self._output = input_name, output_name
        self._path = path

    def __call__(self, images: FloatArray, /) -> FloatArray:
        batch = np.ascontiguousarray(images, dtype=np.float32)
        try:
            logits = self._model.predict({self._input: batch})[self._output]
        except Exception as error:
            message = f"{self._path}: Core ML failed on {images.shape}: {one_line(error)}"
            raise MeasurementError(message) from error
        return np.asarray(logits, dtype=np.float32)


def _device(device: object) -> str:
    """``MLNeuralEngineComputeDevice`` as ``float neural-engine``: how floats are run there."""
    kind = type(device).__name__
    names = {"MLCPUComputeDevice": "cpu", "MLGPUComputeDevice": "gpu"}
    return f"float {names.get(kind, 'neural-engine')}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' progress bars, warnings and log lines out of the user's terminal."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def import_coremltools() -> Any:
    """The coremltools module, imported without its remarks on other packages' versions.

    Raises:
        TargetMissingError: coremltools is not installed, or doesn't go with what is.
    """
    try:
        with quiet():
            import coremltools
    except Exception as error:  # an unfit protobuf or numpy raises anything
        message = (
            f"coremltools cannot be imported ({one_line(error)}); "
            "pip install 'deploykit-vision[coreml]'"
        )
        raise TargetMissingError(message) from error
    return coremltools
