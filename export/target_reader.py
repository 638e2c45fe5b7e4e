"""Files run by targets, on torch tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deploykit.export.registry import Reader
from deploykit.targets.registry import Target, get_target, joined

__all__ = ["loaded", "read_by"]


def loaded(target: Target, path: Path, threads: int) -> Reader:
    """A file loaded by a target: images float32 (N, 3, S, S) to logits float32 (N, classes), or
    to its feature maps, joined.

    Raises:
        DeploykitError: as ``Target.load``.
    """
    run = target.load(path, threads)

    def read(images: Tensor) -> Tensor:
        return torch.from_numpy(joined(run(images.numpy())))

    return read


def read_by(name: str, path: Path) -> tuple[str, Reader]:
    """An exporter's ``reader`` by the target of that name, with torch's number of threads."""
    target = get_target(name)
    return target.runtime(), loaded(target, path, torch.get_num_threads())
