"""Builds an engine: ``python -m deploykit.export.tensorrt_build``, started by the exporter.

It reads one request (JSON) from standard input, writes the engine to a file and one answer (JSON)
to standard output. It is a process of its own because the builder is native code that prints past
its logger and can end the process; the user gets one line instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TypedDict

from deploykit.errors import DeploykitError, TargetMissingError, UsageError
from deploykit.fsio import atomic_write_bytes
from deploykit.targets.nvidia import (
    build_obstacle,
    find_libraries,
    first_error,
    gpu_missing,
    make_logger,
    tidy,
)

__all__ = ["DEFAULT_CAPABILITIES", "Answer", "Request", "main"]

DEFAULT_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
"""Ampere, Ada and Blackwell; taken where no GPU says what it is. FP8 begins with SM89."""

_BEFORE_FP8 = ("SM80", "SM86")
_NOT_CHOICES = ("NONE", "CURRENT")
_CACHE_LIMIT = 2**28


class Request(TypedDict):
    """What the exporter asks for. Paths are files; an empty or 0 value leaves the default."""

    library: str
    onnx: str
    engine: str
    input_name: str
    batch: list[int]  # smallest, best and largest; empty for the file's own
    input_shape: list[int]
    capabilities: list[str]
    workspace_mib: int
    optimization_level: int
    sparse: bool
    fp8: bool
    timing_cache: str


class Answer(TypedDict):
    """What the exporter gets. ``layers`` are counts by type from the parsed network."""

    library: str
    capabilities: list[str]
    layers: dict[str, int]
    cache_refused: bool
    seconds: float


def main() -> int:
    """Answer the request on standard input; exit code 0 when an answer was sent."""
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # native libraries print there
    try:
        answer: Any = build(json.loads(sys.stdin.buffer.read()))
    except DeploykitError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    answers.write(json.dumps(answer))
    answers.flush()
    return 0


def build(request: Request) -> Answer:
    """Parse the ONNX file and write the engine.

    Raises:
        TargetMissingError: no library, or no GPU for one that needs it.
        UsageError: a capability that the library doesn't know.
        DeploykitError: the parser or the builder refuses the network.
    """
    library = find_libraries(request["library"] or None)[0]
    named = hasattr(library, "ComputeCapability")
    capabilities = _capabilities(library, request, named)
    start = time.monotonic()
    logger = make_logger(library)
    builder = library.Builder(logger)
    network = builder.create_network(_strongly_typed(library))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        message = f"{library.__name__} can't read the network: {tidy(reason)}"
        raise DeploykitError(message)
    config = builder.create_builder_config()
    if named:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(library.ComputeCapability, name), index)
    _set_options(library, config, request)
    if request["batch"]:
        _add_profile(builder, config, request)
    cache = None if named else _open_cache(config, request["timing_cache"])
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = first_error(logger.messages, "no reason given")
        message = f"{library.__name__} can't build the network: {reason}"
        raise DeploykitError(message)
    Path(request["engine"]).write_bytes(memoryview(engine))
    if cache is not None:
        atomic_write_bytes(request["timing_cache"], bytes(cache.serialize()))
    return Answer(
        library=f"{library.__name__} {library.__version__}",
        capabilities=capabilities,
        layers=_network_types(library, network),
        cache_refused=bool(request["timing_cache"]) and cache is None,
        seconds=time.monotonic() - start,
    )


def _capabilities(library: Any, request: Request, named: bool) -> list[str]:
    wanted = request["capabilities"]
    if not named:
        if wanted:
            message = (
                f"{library.__name__} builds for the GPU at hand only; to name compute "
                "capabilities, choose the library tensorrt_rtx"
            )
            raise UsageError(message)
        obstacle = build_obstacle(library)
        if obstacle is not None:
            raise TargetMissingError(obstacle)
        return []
    known = [name for name in library.ComputeCapability.__members__ if name not in _NOT_CHOICES]
    for name in wanted:
        if name not in known:
            message = f"unknown compute capability {name!r}; {library.__name__} has: "
            raise UsageError(message + ", ".join(known))
    if wanted:
        return wanted
    if gpu_missing() is None:
        return ["CURRENT"]
    return [name for name in DEFAULT_CAPABILITIES if not request["fp8"] or name not in _BEFORE_FP8]


def _strongly_typed(library: Any) -> int:
    """Before version 11 it was a choice."""
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _set_options(library: Any, config: Any, request: Request) -> None:
    if request["workspace_mib"]:
        pool = library.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, request["workspace_mib"] * 2**20)
    config.builder_optimization_level = request["optimization_level"]
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # for the inspector
    if request["sparse"]:
        config.set_flag(library.BuilderFlag.SPARSE_WEIGHTS)


def _add_profile(builder: Any, config: Any, request: Request) -> None:
    profile = builder.create_optimization_profile()
    shapes = [(batch, *request["input_shape"]) for batch in request["batch"]]
    profile.set_shape(request["input_name"], *shapes)
    if config.add_optimization_profile(profile) < 0:
        message = f"TensorRT refuses the batch sizes {request['batch']}"
        raise DeploykitError(message)


def _open_cache(config: Any, path: str) -> Any:
    """The timing cache in use, or None. (RTX times nothing when it builds and has none.)"""
    if not path:
        return None
    file = Path(path)
    if file.is_symlink() or (file.exists() and not file.is_file()):
        message = f"{path}: wanted a file for the timing cache, not a link or folder"
        raise UsageError(message)
    try:
        data = file.read_bytes() if file.exists() and file.stat().st_size < _CACHE_LIMIT else b""
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; choose another timing cache"
        raise UsageError(message) from error
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")  # another version's or another GPU's
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _network_types(library: Any, network: Any) -> dict[str, int]:
    """Convolutions and products of the parsed network, by the type they were asked to have."""
    made_by = {}
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    for layer in layers:
        for index in range(layer.num_outputs):
            made_by[layer.get_output(index).name] = layer
    counts: dict[str, int] = {}
    kinds = (library.LayerType.CONVOLUTION, library.LayerType.MATRIX_MULTIPLY)
    for layer in layers:
        if layer.type in kinds:
            types = [_source_type(library, layer.get_input(i), made_by) for i in range(2)]
            integer = all(one == library.DataType.INT8 for one in types)
            made = layer.get_output(0).dtype
            half = "float16" if made == library.DataType.HALF else "float32"
            name = "int8" if integer else half
            counts[name] = counts.get(name, 0) + 1
    return counts


def _source_type(library: Any, tensor: Any, made_by: dict[str, Any]) -> Any:
    """The type of a tensor's codes if it is dequantised, perhaps moved around since."""
    moves = (library.LayerType.SHUFFLE, library.LayerType.SLICE)
    while tensor is not None:
        layer = made_by.get(tensor.name)
        if layer is not None and layer.type == library.LayerType.DEQUANTIZE:
            return layer.get_input(0).dtype
        if layer is None or layer.type not in moves:
            return tensor.dtype
        tensor = layer.get_input(0)
    return None


if __name__ == "__main__":
    sys.exit(main())
