"""TensorRT engines, by either of NVIDIA's two libraries.

The graph's ONNX file is rewritten in TensorRT's dialect and built in a process of its own. The
dialect's file stays beside the engine, as ``<engine>.onnx``: it is what can be run without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import onnx
import onnx_ir as ir

from deploykit.errors import DeploykitError, TargetMissingError, UsageError, one_line
from deploykit.export.onnx import onnx_bytes
from deploykit.export.onnx_exporters import INPUT_NAME
from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.export.tensorrt_build import Answer, Request
from deploykit.export.tensorrt_fp8 import fp8_lowerings
from deploykit.export.tensorrt_onnx import LAYERS, Dialect, to_dialect
from deploykit.export.tensorrt_program import kernel_types
from deploykit.export.tensorrt_reader import ENGINE_HASH, companion, run_companion
from deploykit.targets.nvidia import build_obstacle, find_libraries

__all__ = ["TensorrtExporter", "TensorrtOptions"]

# -P: a json.py in the user's folder must not become the builder's json
_BUILDER = (sys.executable, "-P", "-m", "deploykit.export.tensorrt_build")
_ERRORS: dict[str, type[DeploykitError]] = {
    error.__name__: error for error in (DeploykitError, TargetMissingError, UsageError)
}


@dataclass(frozen=True)
class TensorrtOptions:
    """How an engine is built.

    Attributes:
        floats: what isn't integer is computed in; normalisations and sums stay float32.
        library: which of the two; None takes ``tensorrt`` if it is installed.
        batch: smallest, best and largest number of images of a file with dynamic batch; None
            takes one, and the source's usual and largest.
        capabilities: GPUs to build for, such as ``("SM80", "SM89")``, with ``tensorrt_rtx``;
            empty is the GPU at hand, or without one Ampere, Ada and Blackwell.
        workspace_mib: the most scratch memory a layer may take; None leaves the GPU's memory.
        optimization_level: 0 (quickest build) to 5 (longest search).
        timing_cache: file that keeps the timings of kernels between builds; ``tensorrt`` only.
        timeout_seconds: a build that takes longer is ended.
    """

    floats: Literal["float16", "float32"] = "float16"
    library: Literal["tensorrt", "tensorrt_rtx"] | None = None
    batch: tuple[int, int, int] | None = None
    capabilities: tuple[str, ...] = ()
    workspace_mib: int | None = None
    optimization_level: int = 3
    timing_cache: Path | None = None
    timeout_seconds: float = 3600.0

    def __post_init__(self) -> None:
        if self.batch is not None and not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            message = f"wanted batch sizes 1 <= smallest <= best <= largest, got {self.batch}"
            raise UsageError(message)
        if not 0 <= self.optimization_level <= 5:
            message = f"wanted an optimization_level of 0 to 5, got {self.optimization_level}"
            raise UsageError(message)
        if self.workspace_mib is not None and self.workspace_mib < 1:
            message = f"wanted a workspace_mib of 1 or more, got {self.workspace_mib}"
            raise UsageError(message)


@register_exporter("tensorrt")
class TensorrtExporter:
    """See ``Exporter``."""

    name: str
    suffix: str = ".engine"
    profile: Profile = "symmetric"

    def __init__(self, options: TensorrtOptions | None = None) -> None:
        self.options = options or TensorrtOptions()

    def available(self) -> str | None:
        """None, or why no library can be imported, or the one that can can't build here."""
        try:
            return build_obstacle(find_libraries(self.options.library)[0])
        except TargetMissingError as error:
            return str(error)

    def export(self, source: Source, path: Path) -> Exported:
        """Write the engine at ``path`` and the ONNX it was built from at ``<path>.onnx``.

        Raises:
            TargetMissingError: no library, or no GPU for ``tensorrt``.
            UsageError: an unknown compute capability.
            DeploykitError: activations aren't symmetric, or TensorRT refuses the network.
        """
        half = self.options.floats == "float16"
        model = _read(source)
        found = to_dialect(model, half=half)
        for key, value in sorted(source.metadata.items()):
            model.metadata_props[key] = value
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            file.write_bytes(_serialize(model))
            answer = self._build(source, file, path, found)
        engine = path.read_bytes()
        model.metadata_props[ENGINE_HASH] = hashlib.sha256(engine).hexdigest()
        companion(path).write_bytes(_serialize(model))
        names = [str(node.name) for node in model.graph if node.op_type in LAYERS]
        layers, notes = _describe(engine, names, answer, found)
        if half:
            notes.append("what isn't int8 is computed in float16; normalisations in float32")
        precision = "fp16" if half and source.precision == "fp32" else source.precision
        beside = (companion(path).name,)
        return Exported(precision, source.dynamic_batch, tuple(notes), layers, beside, half)

    def reader(self, path: Path) -> tuple[str, Reader] | None:
        """ONNX Runtime on the ONNX that the engine was built from: an engine needs its GPU.

        Raises:
            UsageError: that file isn't beside the engine, or belongs to another one.
        """
        return run_companion(path)

    def _build(self, source: Source, file: Path, path: Path, found: Dialect) -> Answer:
        options, size = self.options, source.backbone.preprocessing.size
        request = Request(
            library=options.library or "",
            onnx=str(file),
            engine=str(path.absolute()),
            input_name=INPUT_NAME,
            batch=list(options.batch or (1, *source.batches)) if source.dynamic_batch else [],
            input_shape=[3, size, size],
            capabilities=list(options.capabilities),
            workspace_mib=options.workspace_mib or 0,
            optimization_level=options.optimization_level,
            sparse=found.sparse_layers > 0,
            fp8=found.fp8_layers > 0,
            timing_cache=str(options.timing_cache.absolute()) if options.timing_cache else "",
        )
        return ask_builder(request, options.timeout_seconds)


def ask_builder(request: Request, timeout_seconds: float) -> Answer:
    """The builder's answer; its process is gone when this returns or raises.

    Raises:
        DeploykitError: as the builder says, or because it died or took too long.
    """
    try:
        done = subprocess.run(
            _BUILDER,
            input=json.dumps(request).encode("ascii"),
            capture_output=True,
            check=False,
            timeout=timeout_seconds,
        )
    except subprocess.TimeoutExpired:
        message = f"TensorRT took more than {timeout_seconds:g} s to build and was ended"
        raise DeploykitError(message) from None
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        last = f": {said[-1].strip()[:300]}" if said else ""
        message = f"TensorRT's builder died (exit code {done.returncode}){last}"
        raise DeploykitError(message) from None
    if "error" in answer:
        raise _ERRORS.get(answer["error"], DeploykitError)(answer["message"])
    return cast(Answer, answer)


def _read(source: Source) -> ir.Model:
    if source.onnx is None:
        data = onnx_bytes(
            source.graph_module,
            source.backbone,
            dynamic_batch=source.dynamic_batch,
            lowerings=fp8_lowerings(),
        )
        return ir.from_proto(onnx.load_model_from_string(data))
    try:
        proto = onnx.load_model(str(source.onnx))
        onnx.checker.check_model(proto)
        return ir.from_proto(proto)
    except Exception as error:  # protobuf's, the checker's and the operating system's
        message = f"{source.onnx} can't be read as an ONNX file: {one_line(error, 200)}"
        raise DeploykitError(message) from error


def _serialize(model: ir.Model) -> bytes:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    data = proto.SerializeToString(deterministic=True)
    assert isinstance(data, bytes)
    return data


def _describe(
    engine: bytes, names: list[str], answer: Answer, found: Dialect
) -> tuple[dict[str, int], list[str]]:
    """Layers by type, and notes."""
    kernels = kernel_types(engine, names)
    built_for = ", ".join(answer["capabilities"]) or "the GPU at hand"
    notes = [f"built by {answer['library']} for {built_for}", *found.notes]
    if kernels:
        layers = kernels
        notes.append(
            f"layer types are of the engine's kernels ({sum(kernels.values())} of {len(names)} "
            "layers found in its program)"
        )
        for kind, wanted in (("int8", found.integer_layers), ("fp8", found.fp8_layers)):
            lost = wanted - kernels.get(kind, 0)
            if lost > 0:
                notes.append(
                    f"{lost} of {wanted} layers with {kind} inputs aren't computed in {kind}, as "
                    "TensorRT fused them"
                )
    else:
        layers = answer["layers"]
        notes.append("layer types are those asked for in the network, not the engine's kernels")
    if found.int4_layers:
        layers = {**layers, "int4 weights": found.int4_layers}
    if found.sparse_layers:
        layers = {**layers, "2:4 weights": found.sparse_layers}
        notes.append(
            f"{found.sparse_layers} of {found.layers} layers have 2:4 zeros: sparse kernels allowed"
        )
    if found.tables:
        notes.append(
            f"{found.tables} activations without equal steps are looked up, and multiplied as "
            "floats"
        )
    if answer["cache_refused"]:
        notes.append("TensorRT-RTX has no timing cache: it times nothing when it builds")
    return layers, notes
