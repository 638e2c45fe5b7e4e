"""Exporters are found by name; a new format is one new file with the decorator.

The exporter ``coreml`` lives in ``coreml.py``. Only the file that is asked for is imported, and
an exporter imports its library only when it is used. Other packages join through the entry-point
group ``deploykit.exporters``.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from torch import Tensor, fx

from deploykit.errors import UsageError
from deploykit.types import Backbone

__all__ = [
    "ENTRY_POINT_GROUP",
    "Exported",
    "Exporter",
    "Profile",
    "Reader",
    "Source",
    "get_exporter",
    "holds_levels",
    "list_exporters",
    "register_exporter",
]

ENTRY_POINT_GROUP = "deploykit.exporters"

_OWN = ("coreml", "executorch", "litert", "ncnn", "onnx", "openvino", "tensorrt", "torch")

Profile = Literal["asymmetric", "mixed", "symmetric"]
"""Of activation codes of 8 bits: unsigned with any zero point; the same, but signed without one
for the second factors of products of two activations; or signed without one everywhere. In a
quantised graph a grid around zero is a ``fake_quantize`` whose zero point is ``2**(bits - 1)``."""

Reader = Callable[[Tensor], Tensor]
"""A file as a function: images float32 (N, 3, S, S) to logits float32 (N, classes)."""


@dataclass(frozen=True)
class Source:
    """A graph to be lowered.

    Attributes:
        graph_module: captured (float) or quantised; input (N, 3, S, S), output (N, classes).
        precision: of the graph: ``fp32``, ``w8a8``, ``w4a16`` …
        dynamic_batch: whether the file should take any number of images.
        metadata: what the file should say of itself, where the format has room for it.
        onnx: the same graph as an ONNX file in the exporter's profile, if there is one.
        batches: the usual and the largest number of images a call, for formats that are tuned to
            them or hold no others.
    """

    graph_module: fx.GraphModule
    backbone: Backbone
    precision: str
    dynamic_batch: bool = True
    metadata: Mapping[str, str] = field(default_factory=dict)
    onnx: Path | None = None
    batches: tuple[int, int] = (1, 32)


@dataclass(frozen=True)
class Exported:
    """What an exporter did.

    Attributes:
        precision: of the file, where it differs from the source's (``fp16``).
        notes: what the user should know, one line each.
        layers: what the format made of the layers, such as ``{"int8": 40, "float": 3}``.
        dynamic_batch: whether the file really takes any number of images.
        half: floats are computed in float16.
        simulated: whatever is quantised in it is computed as floats.
        companions: names of files that were written beside it and needn't ship.
    """

    precision: str
    dynamic_batch: bool
    notes: tuple[str, ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    companions: tuple[str, ...] = ()
    half: bool = False
    simulated: bool = False


class Exporter(Protocol):
    """A file format."""

    name: str
    suffix: str
    """With the dot. A format that is a folder has one, too (``.mlpackage``)."""
    profile: Profile
    # levels: bool = False  it holds feature maps as several outputs; see ``holds_levels``

    def available(self) -> str | None:
        """None when the format can be written, else why not and how to mend it."""
        ...

    def export(self, source: Source, path: Path) -> Exported:
        """Write the file (or folder) at ``path``, and what belongs to it beside it.

        The folder is new and empty: the caller moves what is in it when all of it is there.

        Raises:
            TargetMissingError: the format's library is not installed.
            DeploykitError: the format can't hold the graph.
        """
        ...

    def reader(self, path: Path) -> tuple[str, Reader] | None:
        """How the file can be run on this machine for parity, and by what name.

        None where only its targets can run it (``TargetMissingError`` says what is missing).
        """
        ...


_REGISTRY: dict[str, type[Exporter]] = {}
_T = TypeVar("_T", bound=type[Exporter])


def register_exporter(name: str) -> Callable[[_T], _T]:
    """Class decorator that makes an exporter known under ``name``.

    Raises:
        ValueError: another class already has the name.
    """

    def register(cls: _T) -> _T:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            message = f"exporter {name!r} is already registered by {known.__qualname__}"
            raise ValueError(message)
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return register


def get_exporter(name: str) -> Exporter:
    """The exporter called ``name``.

    Raises:
        UsageError: no format has that name; the nearest names are given.
    """
    if name not in _REGISTRY:
        if name in _OWN:
            importlib.import_module(f"{__package__}.{name}")
        else:
            for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
                _REGISTRY.setdefault(name, point.load())
    try:
        cls = _REGISTRY[name]
    except KeyError:
        known = list_exporters()
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
        message = f"unknown format {name!r}; did you mean: {', '.join(near)}"
        raise UsageError(message) from None
    return cls()


def holds_levels(exporter: Exporter) -> bool:
    """Whether a format holds models with several outputs; one of another package may not say."""
    return bool(getattr(exporter, "levels", False))


def list_exporters() -> list[str]:
    """Names of all formats, sorted, whether or not their library is installed."""
    offered = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return sorted({*_REGISTRY, *_OWN, *offered})
