"""The one place that imports torchvision and timm.

The package index serves torchvision for Linux built against CUDA only. Beside a CPU build of
torch its C library cannot load, and ``import torchvision`` dies because the operator
``torchvision::nms`` was never registered (timm needs torchvision, so it dies as well). Neither
package needs those operators for what deploykit does. Where, and only where, that failure is
seen, this module declares the two operators and imports again; a healthy install never gets here.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

__all__ = ["timm", "torchvision"]

_MISSING_OPERATORS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _import_torchvision() -> ModuleType:
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name, schema in _MISSING_OPERATORS.items():
            torch.library.define(name, schema)
        import torchvision
    return torchvision  # type: ignore[no-any-return]


torchvision = _import_torchvision()

import timm  # noqa: E402  (must follow the line above)
