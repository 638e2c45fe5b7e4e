"""The nouns of profiles, and how a runtime's reader is found."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

from deploykit.errors import TargetMissingError
from deploykit.targets.profiling.ownership import SourceGraph
from deploykit.targets.registry import FloatArray

__all__ = ["KINDS", "Kernel", "Kind", "Reader", "get_reader", "profiled_targets", "without_endings"]

Kind = Literal["compute", "quantise", "reformat", "other"]
"""Of a kernel: products and convolutions; codes from floats and floats from codes; values moved,
reordered or cast; and the rest (norms, softmax, activations, sums)."""

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Kernel:
    """One thing that a runtime ran, in the order of running.

    Attributes:
        key: what tells it from every other kernel of the file, the same each time it is loaded.
        name: the runtime's own.
        op: what it computes, in the runtime's words.
        precision: of what it reads and computes with: ``int8``, ``float32``, ``bfloat16`` …
        ms: of one call.
    """

    key: str
    name: str
    op: str
    kind: Kind
    precision: str
    ms: float


class Reader(Protocol):
    """A runtime's profiler."""

    def kernels(self, path: Path, threads: int, images: FloatArray, calls: int) -> list[Kernel]:
        """Load the file anew, profile ``calls`` calls after the first, and give each kernel.

        Raises:
            TargetMissingError: the runtime is not installed.
            MeasurementError: its profile can't be read or names no kernel.
        """
        ...

    def source(self, path: Path) -> SourceGraph:
        """The file's own operators, whose names the kernels bear.

        Raises:
            UsageError: the file can't be read.
        """
        ...

    def undecorated(self, name: str) -> list[str]:
        """A kernel's name without what the runtime appends, one ending less each time."""
        ...


def without_endings(name: str, ending: re.Pattern[str]) -> list[str]:
    """The name with one ``ending`` less, with two less, and so on until none is left."""
    found = []
    while (bare := ending.sub("", name)) != name:
        found.append(bare)
        name = bare
    return found


_READERS = {
    "cpu-onnxruntime": "onnxruntime:OnnxRuntimeReader",
    "cpu-openvino": "openvino:OpenvinoReader",
    "cpu-torch": "torch_eager:TorchReader",
    "cpu-torch-compiled": "torch_compiled:TorchCompiledReader",
    "cuda-torch": "torch_compiled:CudaTorchReader",
    "cuda-tensorrt": "tensorrt:TensorrtReader",
}


def profiled_targets() -> list[str]:
    """Names of the targets whose runtimes have a reader."""
    return sorted(_READERS)


def get_reader(target: str) -> Reader:
    """The reader for a target.

    Raises:
        TargetMissingError: there is none.
    """
    if target not in _READERS:
        message = (
            f"no profiler of {target} is read here; targets with one: "
            f"{', '.join(profiled_targets())}"
        )
        raise TargetMissingError(message)
    module, _, name = _READERS[target].partition(":")
    reader: Reader = getattr(importlib.import_module(f"{__package__}.{module}"), name)()
    return reader
