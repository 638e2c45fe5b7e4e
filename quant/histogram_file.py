"""Histograms on disk, so that an interrupted run need not calibrate again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from deploykit.quant.observers import Histogram, Watch

__all__ = ["load_histograms", "save_histograms"]


def _key(watch: Watch) -> str:
    return f"{watch.node}|{'' if watch.channel_axis is None else watch.channel_axis}"


def save_histograms(histograms: Mapping[Watch, Histogram]) -> bytes:
    """The histograms as the bytes of a safetensors file."""
    tensors = {}
    for watch, histogram in histograms.items():
        for part in ("low", "high", "counts"):
            tensors[f"{_key(watch)}|{part}"] = getattr(histogram, part).contiguous()
    data: bytes = save(tensors)
    return data


def load_histograms(path: Path, watches: Sequence[Watch]) -> dict[Watch, Histogram] | None:
    """The histograms of exactly these watches, or None if the file isn't there or isn't theirs."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError):
        return None
    found = {}
    for watch in watches:
        parts = [tensors.get(f"{_key(watch)}|{part}") for part in ("low", "high", "counts")]
        if any(part is None for part in parts):
            return None
        found[watch] = Histogram(*parts)
    return found
