"""deploykit: compress vision backbones, export them, and measure the file that ships.

import deploykit
report = deploykit.compress(model="shvit_s1", bits="w8a8", weights="my.safetensors",
                            calib="images/", data="val/", out="out/")
report.check(max_drop=1.0, max_latency_ms=5.0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deploykit.api import compress, load_report
    from deploykit.recipe import Recipe
    from deploykit.report.model import Report

__all__ = ["Recipe", "Report", "compress", "load_report"]

_HOMES = {
    "compress": "deploykit.api",
    "load_report": "deploykit.api",
    "Recipe": "deploykit.recipe",
    "Report": "deploykit.report.model",
}


def __getattr__(name: str) -> Any:
    # Lazy: the timing worker and `deploykit --help` must not pay for torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
