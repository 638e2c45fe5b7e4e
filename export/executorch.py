"""ExecuTorch programs (``.pte``) for XNNPACK, the CPU delegate of phones and PCs."""

from __future__ import annotations

from pathlib import Path

from deploykit.export.archive import archived, removed_on_error
from deploykit.export.plain_lowering import Lowered, lower_plainly
from deploykit.export.registry import Exported, Profile, Reader, Source, register_exporter
from deploykit.export.target_reader import read_by
from deploykit.targets.environments import missing
from deploykit.targets.host import call

__all__ = ["ExecutorchExporter"]

_EXPORT_SECONDS = 3600.0


@register_exporter("executorch")
class ExecutorchExporter:
    """Programs for one image at a time, made and read in ExecuTorch's own environment."""

    name: str
    suffix: str = ".pte"
    profile: Profile = "asymmetric"

    def available(self) -> str | None:
        """None, or that the environment is not there and the command that makes it."""
        return missing("executorch")

    def export(self, source: Source, path: Path) -> Exported:
        """Write the program at ``path``.

        Raises:
            TargetMissingError: ExecuTorch's environment is not there.
            DeploykitError: ExecuTorch can't lower the graph.
        """
        lowered = lower_plainly(source.graph_module, codes_in_graph=True)
        with removed_on_error(path), archived(lowered.graph_module, source.backbone) as program:
            layers = call(
                "executorch",
                "deploykit.export.workers.executorch:write",
                _EXPORT_SECONDS,
                program=str(program),
                path=str(path.absolute()),
            )
        return Exported(
            precision=source.precision,
            dynamic_batch=False,
            notes=_notes(lowered, layers),
            layers=layers,
        )

    def reader(self, path: Path) -> tuple[str, Reader] | None:
        """The program run by ExecuTorch on this machine."""
        return read_by("mobile-executorch", path)


def _notes(lowered: Lowered, layers: dict[str, int]) -> tuple[str, ...]:
    notes = ["takes one image at a time"]
    dynamic = sum(count for kind, count in layers.items() if kind.endswith("dynamic"))
    if dynamic:
        notes.append(
            f"{dynamic} layers without an output grid choose their input's grid when they run "
            "(8 bits, row by row): XNNPACK's fixed-grid layers must write integers"
        )
    floats = len(lowered.dynamic) - dynamic
    if floats > 0:
        notes.append(f"{floats} layers without an output grid run as floats, weights included")
    if lowered.weight_only:
        notes.append(
            f"weights of {len(lowered.weight_only)} layers with float input became floats: "
            "XNNPACK has no kernel that reads their codes"
        )
    if layers.get("portable"):
        notes.append(f"{layers['portable']} layers run outside XNNPACK, which is slow")
    return tuple(notes)
