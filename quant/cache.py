"""What an interrupted run keeps: histograms, and every unit that is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from deploykit.quant.histogram_file import load_histograms, save_histograms
from deploykit.quant.observers import Histogram, Watch

__all__ = ["TensorCache"]


@dataclass(frozen=True)
class TensorCache:
    """A folder of safetensors files, each written whole or not at all.

    Attributes:
        write: how a file is written.
        shared: a folder for the histograms, which several quantisations of a graph can share.
    """

    folder: Path
    write: Callable[[Path, bytes], None]
    shared: Path | None = None

    @property
    def _histograms(self) -> Path:
        return (self.shared or self.folder) / "histograms.safetensors"

    def histograms(self, watches: Sequence[Watch]) -> dict[Watch, Histogram] | None:
        """Those of exactly these watches, or None."""
        return load_histograms(self._histograms, watches)

    def keep_histograms(self, histograms: Mapping[Watch, Histogram]) -> None:
        self.write(self._histograms, save_histograms(histograms))

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors kept under a name, or None."""
        try:
            found: dict[str, Tensor] = load_file(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError):
            return None
        return found

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.write(
            self.folder / f"{name}.safetensors",
            save({key: value.contiguous() for key, value in tensors.items()}),
        )
