"""TensorRT on an NVIDIA GPU, by either of its two libraries."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deploykit.errors import MeasurementError, TargetMissingError, UsageError, one_line
from deploykit.targets.nvidia import find_libraries, first_error, gpu_missing, make_logger
from deploykit.targets.registry import FloatArray, Runner, register_target

__all__ = ["CudaTensorrt", "count_kernels"]

_PRODUCTS = ("conv", "gemm", "matmul", "mat_mul", "matrixmultiply", "matrix_multiply", "fc", "mha")
_INTEGER = ("int8", "int4")


@register_target("cuda-tensorrt")
class CudaTensorrt:
    """The GPU that torch calls current. Types are the engine's: nothing is chosen here."""

    name: str
    formats: tuple[str, ...] = ("engine",)
    exporter: str = "tensorrt"
    floats: str = "as the file says"

    def available(self) -> str | None:
        """None, or what is missing: a driver, a library, or a torch built for CUDA."""
        missing = gpu_missing()
        if missing is not None:
            return f"cuda-tensorrt needs an NVIDIA GPU, but {missing}; run on a machine with one"
        try:
            find_libraries()
        except TargetMissingError as error:
            return str(error)
        if not _torch().cuda.is_available():
            return (
                f"cuda-tensorrt holds its data in torch's CUDA tensors, and torch "
                f"{_torch().__version__} can't use the GPU; install torch's build for CUDA"
            )
        return None

    def runtime(self) -> str:
        """Libraries' names and versions, CUDA's, and the GPU's."""
        cuda = _torch().cuda
        major, minor = cuda.get_device_capability()
        names = " or ".join(f"{one.__name__} {one.__version__}" for one in find_libraries())
        return (
            f"{names}, CUDA {_torch().version.cuda}, {cuda.get_device_name()} "
            f"(SM{major}{minor}), precision as the engine says"
        )

    def kernels(self, path: Path) -> dict[str, int]:
        """Layers of the loaded engine that multiply, by the inspector's account of their types.

        Raises:
            TargetMissingError, UsageError: as ``load``.
        """
        library, engine, _kept = _deserialize(path)
        inspector = engine.create_engine_inspector()
        return count_kernels(
            json.loads(inspector.get_engine_information(library.LayerInformationFormat.JSON))
        )

    def load(self, path: Path, threads: int) -> Runner:  # noqa: ARG002  a GPU has its own
        """An execution context with its own CUDA stream.

        A call copies the images to the GPU, runs, copies the logits back and waits for that.

        Raises:
            TargetMissingError: a library, a driver or a GPU is missing.
            UsageError: the file is not there, was built for another GPU or version, or has not
                one input and one output.
        """
        library, engine, kept = _deserialize(path)
        logger = kept[1]
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == library.TensorIOMode.INPUT]
        outputs = [name for name in names if modes[name] == library.TensorIOMode.OUTPUT]
        if len(inputs) != 1 or len(outputs) != 1:
            message = (
                f"{path}: wanted an engine with one input and one output, it has {len(inputs)} "
                f"and {len(outputs)}"
            )
            raise UsageError(message)
        for name in names:
            if engine.get_tensor_dtype(name) != library.DataType.FLOAT:
                message = f"{path}: wanted float32 input and output, {name} is another type"
                raise UsageError(message)
        context = engine.create_execution_context()
        if context is None:
            reason = first_error(logger.messages, "no reason given")
            message = f"{path}: {library.__name__} cannot run it: {reason}"
            raise UsageError(message)
        return _Context(context, engine, kept, inputs[0], outputs[0], path, library)


class _Context:
    def __init__(
        self,
        context: Any,
        engine: Any,
        kept: tuple[Any, Any],
        source: str,
        result: str,
        path: Path,
        library: Any,
    ) -> None:
        torch = _torch()
        self._context = context
        self._engine = engine  # the context doesn't keep it alive
        self._runtime, self._logger = kept
        self._input, self._output = source, result
        self._path, self._library = path, library
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._stream = torch.cuda.Stream(self._device)
        self._image: Any = None
        self._logits: Any = None

    def __call__(self, images: FloatArray, /) -> FloatArray:
        torch = _torch()
        batch = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
        try:
            with torch.cuda.stream(self._stream):
                if self._image is None or self._image.shape != batch.shape:
                    self._bind(tuple(batch.shape))
                self._image.copy_(batch)
                if not self._context.execute_async_v3(self._stream.cuda_stream):
                    raise RuntimeError(first_error(self._logger.messages, "no reason given"))
                logits = self._logits.cpu()
            self._stream.synchronize()
        except RuntimeError as error:  # torch's and our own
            message = f"{self._path}: TensorRT failed on {images.shape}: {one_line(error)}"
            raise MeasurementError(message) from error
        return np.asarray(logits.numpy(), dtype=np.float32)

    def inspected(self) -> tuple[Any, dict[str, Any]]:
        """The library, and the inspector's account of the engine."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._library.LayerInformationFormat.JSON)
        return self._library, dict(json.loads(text))

    def profile_with(self, profiler: Any) -> None:
        """Tell a profiler (``IProfiler``) the time of every layer of the calls that follow."""
        self._context.profiler = profiler

    def _bind(self, shape: tuple[int, ...]) -> None:
        """Buffers for images of this shape; their addresses hold until the next shape."""
        torch = _torch()
        self._image = self._logits = None
        self._logger.messages.clear()
        if not self._context.set_input_shape(self._input, shape):
            low, _, high = self._engine.get_tensor_profile_shape(self._input, 0)
            message = f"the engine was built for {tuple(low)} to {tuple(high)}"
            raise RuntimeError(message)
        made = tuple(self._context.get_tensor_shape(self._output))
        image = torch.empty(shape, dtype=torch.float32, device=self._device)
        logits = torch.empty(made, dtype=torch.float32, device=self._device)
        for name, tensor in ((self._input, image), (self._output, logits)):
            if not self._context.set_tensor_address(name, tensor.data_ptr()):
                raise RuntimeError(first_error(self._logger.messages, f"no buffer for {name}"))
        self._image, self._logits = image, logits


def count_kernels(information: Mapping[str, Any]) -> dict[str, int]:
    """The inspector's JSON as counts of multiplying layers, ``int8`` or ``float`` in front.

    The type is that of a layer's inputs; ``sparse`` follows where the tactic's name has it. RTX
    shows one compiled program instead of its layers; that is counted as such.

    Args:
        information: with a list ``Layers`` of objects (detailed) or of names.
    """
    counts: Counter[str] = Counter()
    for layer in information.get("Layers", []):
        if not isinstance(layer, dict):
            counts["unknown: the engine was built without layer details"] += 1
            continue
        kind = str(layer.get("LayerType", "")).lower()
        title = f"{kind} {layer.get('TacticName', '')}".lower()
        if "foreignnode" in str(layer.get("Name", "")).lower():
            counts["compiled program"] += 1
        elif any(word in title for word in _PRODUCTS):
            types = [str(one.get("Format/Datatype", "")).lower() for one in layer.get("Inputs", [])]
            integer = bool(types) and any(word in types[0] for word in _INTEGER)
            sparse = "sparse " if "sparse" in title else ""
            counts[f"{'int8' if integer else 'float'} {sparse}{layer.get('LayerType')}"] += 1
    return dict(counts)


def _deserialize(path: Path) -> tuple[Any, Any, tuple[Any, Any]]:
    """The library that takes the file, the engine, and (runtime, logger), to be kept with it."""
    missing = gpu_missing()
    if missing is not None:
        message = f"cuda-tensorrt needs an NVIDIA GPU, but {missing}; run on a machine with one"
        raise TargetMissingError(message)
    if not path.is_file():
        message = f"{path}: no such file"
        raise UsageError(message)
    data = path.read_bytes()
    reasons = []
    for library in find_libraries():
        logger = make_logger(library)
        runtime = library.Runtime(logger)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is not None:
            return library, engine, (runtime, logger)
        reasons.append(f"{library.__name__}: {first_error(logger.messages, 'not its file')}")
    message = f"{path}: cannot be loaded ({'; '.join(reasons)}); build it for this GPU and version"
    raise UsageError(message)


def _torch() -> Any:
    """Imported when it is used: the other targets' measuring process does without."""
    import torch

    return torch
