"""ncnn models: a folder (``.ncnn``) with ``model.param`` and ``model.bin``. Floats only."""

from __future__ import annotations

from pathlib import Path

import torch

from deploykit.errors import DeploykitError
from deploykit.export.archive import archived, removed_on_error
from deploykit.export.plain_lowering import lower_plainly
from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.export.target_reader import read_by
from deploykit.graph.edit import is_op
from deploykit.targets.environments import missing
from deploykit.targets.host import call
from deploykit.targets.registry import get_target

__all__ = ["NcnnExporter"]

_EXPORT_SECONDS = 3600.0
_TOLERANCE = 0.05
_OURS = torch.ops.deploykit
_QUANTIZERS = (
    _OURS.fake_quantize.default,
    _OURS.fake_quantize_log.default,
    _OURS.fake_quantize_twin.default,
)


@register_exporter("ncnn")
class NcnnExporter:
    """Float models for one image at a time, by pnnx, in ncnn's own environment.

    A source whose precision is ``fp16`` gets weights of 16 bits; any other of 32.
    """

    name: str
    suffix: str = ".ncnn"
    profile: Profile = "asymmetric"

    def available(self) -> str | None:
        """None, or that the environment is not there and the command that makes it."""
        return missing("ncnn")

    def export(self, source: Source, path: Path) -> Exported:
        """Write the folder at ``path``, then load it and run an image through it.

        pnnx writes a file for nearly any graph; only running it shows whether ncnn can.

        Raises:
            TargetMissingError: ncnn's environment is not there.
            DeploykitError: the graph quantises activations, pnnx or ncnn can't take it, or what
                ncnn computes is something else.
        """
        name = source.backbone.name
        if any(is_op(node, *_QUANTIZERS) for node in source.graph_module.graph.nodes):
            message = (
                f"{name} can't be exported to ncnn at {source.precision}: "
                "its converter has no integer layers; export the float model"
            )
            raise DeploykitError(message)
        lowered = lower_plainly(source.graph_module, codes_in_graph=False)
        half = source.precision == "fp16"
        with removed_on_error(path), archived(lowered.graph_module, source.backbone) as program:
            layers = call(
                "ncnn",
                "deploykit.export.workers.ncnn:write",
                _EXPORT_SECONDS,
                program=str(program),
                path=str(path.absolute()),
                half=half,
            )
            self._check(source, path)
        notes = ["takes one image at a time"]
        if lowered.weight_only:
            notes.append(f"weights of {len(lowered.weight_only)} layers became floats")
        return Exported(
            precision="fp16" if half else source.precision,
            dynamic_batch=False,
            notes=tuple(notes),
            layers=layers,
        )

    def reader(self, path: Path) -> tuple[str, Reader] | None:
        """The model run by ncnn on this machine."""
        return read_by("mobile-ncnn", path)

    def _check(self, source: Source, path: Path) -> None:
        size = source.backbone.preprocessing.size
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, 3, size, size, generator=generator)
        with torch.no_grad():
            wanted = source.graph_module(image)
        found = torch.from_numpy(get_target("mobile-ncnn").load(path, 1)(image.numpy()))
        if found.shape != wanted.shape:
            message = f"ncnn gives {tuple(found.shape)} for {tuple(wanted.shape)} logits"
            raise DeploykitError(message)
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
        if not error < _TOLERANCE:
            message = f"ncnn computes something else than the graph: off by {error:.1%} of it"
            raise DeploykitError(message)
