"""OpenVINO's own format: a graph in XML and its weights beside it."""

from __future__ import annotations

from pathlib import Path

from deploykit.errors import DeploykitError, one_line
from deploykit.export.onnx import lower_onnx
from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.runtimes import import_openvino, why_not

__all__ = ["Openvino"]


@register_exporter("openvino")
class Openvino:
    """``model.xml`` with ``model.bin``, by OpenVINO's reader of ONNX.

    Products of two activations run as integers only if the second is signed without a zero
    point, hence the profile.
    """

    name: str
    suffix: str = ".xml"
    profile: Profile = "mixed"
    levels: bool = True

    def available(self) -> str | None:
        """None, or why openvino cannot be imported."""
        return why_not(import_openvino)

    def export(self, source: Source, path: Path) -> Exported:
        """See ``Exporter.export``. Weights keep their precision: none is rounded to fp16.

        Raises:
            TargetMissingError: openvino is not installed.
            DeploykitError: OpenVINO refuses the graph.
        """
        openvino = import_openvino()
        data, notes = lower_onnx(
            source.graph_module, source.backbone, dynamic_batch=source.dynamic_batch, signed=True
        )
        try:
            model = openvino.Core().read_model(data)
            for key, value in sorted({**source.metadata, "precision": source.precision}.items()):
                model.set_rt_info(value, ["deploykit", key])
            openvino.save_model(model, str(path), compress_to_fp16=False)
        except Exception as error:  # its exceptions share no base of their own
            message = f"{source.backbone.name}: openvino refuses the graph: {one_line(error)}"
            raise DeploykitError(message) from error
        return Exported(source.precision, source.dynamic_batch, tuple(notes))

    def reader(self, path: Path) -> tuple[str, Reader] | None:  # noqa: ARG002
        """None: OpenVINO's runtime is a target."""
        return None
