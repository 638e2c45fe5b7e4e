"""What a run ran on: versions, machine, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from functools import cache
from typing import Any

import cpuinfo
import psutil
import torch

__all__ = ["environment", "version"]

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "torch-pruning",
    "coremltools",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "numpy",
)


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def version() -> str:
    """deploykit's own version, or 0 where it runs without being installed."""
    return _installed("deploykit-vision") or "0"


@cache
def environment() -> dict[str, Any]:
    """JSON-able description of software and machine; nothing that names the user."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return {
        "deploykit": version(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", "unknown"),
        "cores_allowed": len(list(allowed)),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": {name: found for name in _PACKAGES if (found := _installed(name))},
    }
