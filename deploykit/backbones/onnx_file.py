"""An ONNX file as a backbone: ``--model model.onnx``."""

from __future__ import annotations

from pathlib import Path

from deploykit.backbones.given_file import assumed_preprocessing, refuse_options
from deploykit.onnx_import.examine import read_onnx
from deploykit.recipe import ModelSection
from deploykit.types import Backbone, WeightsOrigin

__all__ = ["build_onnx_file"]


def build_onnx_file(path: Path, model: ModelSection, notes: list[str]) -> Backbone:
    """Read, verify and dress the file. Adds to ``notes`` what was assumed.

    Raises:
        UsageError: the file can't be had, read or trusted, or the recipe asks for what it isn't.
    """
    refuse_options(path, model)
    found = read_onnx(path, model.img_size)
    refuse_options(path, model, found.classes)
    notes.append(
        f"{path.name} was read as torch; against ONNX Runtime on random images: "
        f"SQNR {found.sqnr_db:.0f} dB"
    )
    if found.size_is_free and model.img_size is None:
        notes.append(f"the file leaves the input's size open: {found.size} pixels are assumed")
    return Backbone(
        name=path.stem,
        module=found.module,
        preprocessing=model.preprocessing or assumed_preprocessing(path, found.size, notes),
        weights=WeightsOrigin(kind="file", source=str(path), sha256=found.sha256),
        num_classes=found.classes,
        family="ONNX file",
    )
